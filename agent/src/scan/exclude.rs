//! Exclude patterns, with restic's meaning.
//!
//! A pattern without a leading `/` matches at any depth, one with it from the root of the file system. `*` and `?` do not
//! cross `/`, `**` does. A directory that matches is not entered. `!pattern` includes again what an earlier pattern
//! excluded; the last pattern that matches decides.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

/// A pattern that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error("the exclude pattern `{pattern}` is not valid ({why}); nothing was saved: correct the pattern")]
pub struct PatternError {
    /// As given.
    pub pattern: String,
    /// What is wrong with it.
    pub why: String,
}

/// Compiled patterns.
#[derive(Clone, Debug, Default)]
pub struct Excludes {
    set: GlobSet,
    again: Vec<bool>,
}

impl Excludes {
    /// Compiles `patterns`, in order.
    pub fn new(patterns: &[String]) -> Result<Self, PatternError> {
        Self::with_insensitive(patterns, &[])
    }

    /// Compiles `patterns`, then `insensitive` ones, for which upper and lower case are the same.
    pub fn with_insensitive(patterns: &[String], insensitive: &[String]) -> Result<Self, PatternError> {
        let mut builder = GlobSetBuilder::new();
        let mut again = Vec::with_capacity(patterns.len() + insensitive.len());
        let all = patterns.iter().map(|pattern| (pattern, false));
        for (pattern, folds) in all.chain(insensitive.iter().map(|pattern| (pattern, true))) {
            let refused = |why: String| PatternError { pattern: pattern.clone(), why };
            let (negated, text) = match pattern.strip_prefix('!') {
                Some(rest) => (true, rest),
                None => (false, pattern.as_str()),
            };
            let text = if text.len() > 1 { text.trim_end_matches('/') } else { text };
            if text.is_empty() {
                return Err(refused("it is empty".into()));
            }
            let anchored = if text.starts_with('/') { text.to_owned() } else { format!("**/{text}") };
            let glob = GlobBuilder::new(&anchored).literal_separator(true).case_insensitive(folds).build();
            builder.add(glob.map_err(|error| refused(error.to_string()))?);
            again.push(negated);
        }
        let set =
            builder.build().map_err(|error| PatternError { pattern: patterns.join(" "), why: error.to_string() })?;
        Ok(Self { set, again })
    }

    /// Whether `path` (absolute, raw) is excluded.
    pub fn matches(&self, path: &[u8]) -> bool {
        if self.again.is_empty() {
            return false;
        }
        let last = self.set.matches(OsStr::from_bytes(path)).into_iter().max();
        last.and_then(|index| self.again.get(index)).is_some_and(|negated| !negated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_what_restic_means() {
        let excludes =
            |patterns: &[&str]| Excludes::new(&patterns.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        for (pattern, path, excluded) in [
            ("*.o", "/home/a/x.o", true),
            ("*.o", "/home/a/x.c", false),
            ("cache", "/home/cache", true),
            ("cache", "/home/mycache", false),
            ("cache/", "/home/cache", true),
            ("a/*.c", "/src/a/x.c", true),
            ("a/*.c", "/src/a/b/x.c", false),
            ("/tmp", "/tmp", true),
            ("/tmp", "/var/tmp", false),
            ("/var/**/log", "/var/a/b/log", true),
            ("/home/*/x", "/home/a/b/x", false),
        ] {
            assert_eq!(excludes(&[pattern]).matches(path.as_bytes()), excluded, "{pattern} {path}");
        }
        assert!(excludes(&["*.o"]).matches(b"/a/\xff\n.o"));
        let folding = Excludes::with_insensitive(&["*.o".into()], &["*.JPG".into()]).unwrap();
        assert!(folding.matches(b"/a/x.Jpg") && folding.matches(b"/a/x.o") && !folding.matches(b"/a/x.O"));
        assert!(!excludes(&["*.o", "!keep.o"]).matches(b"/a/keep.o"));
        assert!(Excludes::new(&["[".into()]).is_err());
        assert!(Excludes::new(&[String::new()]).is_err());
    }
}
