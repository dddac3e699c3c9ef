//! Include and exclude patterns, matched against paths in the snapshot.
//!
//! A pattern that begins with `/` is anchored at the snapshot's root; any other matches at any depth. `*` and `?` stay
//! within a name, `**` crosses directories.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use strandline_messages::ChunkId;

use super::RestoreError;
use crate::trees::{TreeReader, Walk};

pub(super) struct Filter {
    include: Option<Include>,
    exclude: GlobSet,
}

struct Include {
    patterns: Vec<String>,
    set: GlobSet,
    /// The pattern that each glob of the set belongs to.
    owners: Vec<usize>,
    /// Directories on the way to what anchored patterns name; `None`: anything may lead to something.
    leads: Option<GlobSet>,
    /// Patterns that have matched something.
    seen: Vec<AtomicBool>,
}

impl Filter {
    pub(super) fn new(include: &[String], exclude: &[String]) -> Result<Self, RestoreError> {
        let include = if include.is_empty() { None } else { Some(Include::new(include)?) };
        Ok(Self { include, exclude: compile(exclude)?.0 })
    }

    /// Whether the path itself is excluded.
    pub(super) fn excludes(&self, path: &[u8]) -> bool {
        self.exclude.is_match(as_path(path))
    }

    /// Whether the path itself is included; everything is if there are no include patterns.
    pub(super) fn includes(&self, path: &[u8]) -> bool {
        self.include.as_ref().is_none_or(|include| include.matches(path))
    }

    /// Whether something below a directory that is not included itself may be.
    pub(super) fn leads_to_something(&self, directory: &[u8]) -> bool {
        let leads = self.include.as_ref().and_then(|include| include.leads.as_ref());
        leads.is_none_or(|leads| leads.is_match(as_path(directory)))
    }

    /// The walk as these patterns want it.
    pub(super) fn walk(&self, reader: &TreeReader, directory: ChunkId, path: &[u8]) -> Walk {
        let walk = reader.walk(directory, path);
        if self.include.as_ref().is_some_and(|include| include.leads.is_some()) { walk.selective() } else { walk }
    }

    /// Whether the path or a directory above it is included by a pattern.
    pub(super) fn includes_from_above(&self, path: &[u8]) -> bool {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(end, _)| end).chain([path.len()]);
        self.include.is_some() && ends.filter_map(|end| path.get(..end)).any(|above| self.includes(above))
    }

    /// Include patterns that have matched nothing so far.
    pub(super) fn unmatched(&self) -> Vec<String> {
        let Some(include) = &self.include else { return Vec::new() };
        let unseen = include.patterns.iter().zip(&include.seen).filter(|(_, seen)| !seen.load(Ordering::Relaxed));
        unseen.map(|(pattern, _)| pattern.clone()).collect()
    }
}

impl Include {
    fn new(patterns: &[String]) -> Result<Self, RestoreError> {
        let (set, owners) = compile(patterns)?;
        let leads: Option<Vec<String>> = patterns
            .iter()
            .map(|pattern| leads_of(pattern))
            .collect::<Option<Vec<_>>>()
            .map(|leads| leads.into_iter().flatten().map(|lead| format!("/{lead}")).collect());
        let leads = leads.map(|leads| compile(&leads)).transpose()?.map(|(set, _)| set);
        let seen = patterns.iter().map(|_| AtomicBool::new(false)).collect();
        Ok(Self { patterns: patterns.to_vec(), set, owners, leads, seen })
    }

    fn matches(&self, path: &[u8]) -> bool {
        let matches = self.set.matches(as_path(path));
        for glob in &matches {
            if let Some(seen) = self.owners.get(*glob).and_then(|owner| self.seen.get(*owner)) {
                seen.store(true, Ordering::Relaxed);
            }
        }
        !matches.is_empty()
    }
}

/// Patterns of the directories on the way to what an anchored pattern names. `None`: it may be anywhere.
fn leads_of(pattern: &str) -> Option<Vec<String>> {
    let anchored = pattern.trim_end_matches('/').strip_prefix('/')?;
    let mut leads = Vec::new();
    let mut lead = String::new();
    for name in anchored.split('/') {
        // Such a name may stand for several, or its brackets may reach over a slash.
        if name.contains("**") || name.contains(['[', '{', '\\']) {
            leads.push(format!("{lead}**"));
            break;
        }
        lead += name;
        leads.push(lead.clone());
        lead.push('/');
    }
    Some(leads)
}

fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

/// The globs of the patterns, and the pattern that each belongs to.
fn compile(patterns: &[String]) -> Result<(GlobSet, Vec<usize>), RestoreError> {
    let mut set = GlobSetBuilder::new();
    let mut owners = Vec::new();
    for (owner, pattern) in patterns.iter().enumerate() {
        let malformed =
            |error: globset::Error| RestoreError::Pattern { pattern: pattern.clone(), why: error.kind().to_string() };
        let mut add = |text: &str| -> Result<(), RestoreError> {
            set.add(GlobBuilder::new(text).literal_separator(true).build().map_err(malformed)?);
            owners.push(owner);
            Ok(())
        };
        let body = pattern.trim_end_matches('/');
        if let Some(anchored) = body.strip_prefix('/') {
            add(anchored)?;
        } else {
            add(body)?;
            add(&format!("**/{body}"))?;
        }
    }
    let failed = |error: globset::Error| RestoreError::Pattern { pattern: String::new(), why: error.to_string() };
    Ok((set.build().map_err(failed)?, owners))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_on_the_way_to_an_anchored_pattern_are_walked() {
        let filter = |patterns: &[&str]| {
            let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
            Filter::new(&patterns, &[]).unwrap()
        };
        for (patterns, directory, leads) in [
            (&["/a/b/c"][..], "a", true),
            (&["/a/b/c"], "a/b", true),
            (&["/a/b/c"], "b", false),
            (&["/a/b/c"], "a/x", false),
            (&["/a/*/c", "/x"], "a/anything", true),
            (&["/a/*/c"], "a/b/d", false),
            (&["/a/**/c"], "a/b/d/e", true),
            (&["/a/**/c"], "b", false),
            (&["/a/{b,c/d}/e"], "a/c/d", true),
            (&["/a/[b]/e"], "a/b", true),
            (&["/a/b", "name"], "anywhere/else", true),
        ] {
            assert_eq!(filter(patterns).leads_to_something(directory.as_bytes()), leads, "{patterns:?} {directory}");
        }
        let some = filter(&["/a/b", "nothing"]);
        assert!(some.includes(b"a/b") && !some.includes(b"a/c"));
        assert_eq!(some.unmatched(), ["nothing"]);
    }
}
