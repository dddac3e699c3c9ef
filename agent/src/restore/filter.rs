//! Include and exclude patterns, matched against paths in the snapshot.
//!
//! A pattern that begins with `/` is anchored at the snapshot's root; any other matches at any depth. `*` and `?` stay
//! within a name, `**` crosses directories.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use super::RestoreError;

pub(super) struct Filter {
    include: Option<GlobSet>,
    exclude: GlobSet,
}

impl Filter {
    pub(super) fn new(include: &[String], exclude: &[String]) -> Result<Self, RestoreError> {
        let include = if include.is_empty() { None } else { Some(compile(include)?) };
        Ok(Self { include, exclude: compile(exclude)? })
    }

    /// Whether the path itself is excluded.
    pub(super) fn excludes(&self, path: &[u8]) -> bool {
        self.exclude.is_match(as_path(path))
    }

    /// Whether the path itself is included; everything is if there are no include patterns.
    pub(super) fn includes(&self, path: &[u8]) -> bool {
        self.include.as_ref().is_none_or(|include| include.is_match(as_path(path)))
    }
}

impl Filter {
    /// Whether the path or a directory above it is included by a pattern.
    pub(super) fn includes_from_above(&self, path: &[u8]) -> bool {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(end, _)| end).chain([path.len()]);
        self.include.is_some() && ends.filter_map(|end| path.get(..end)).any(|above| self.includes(above))
    }
}

fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

fn compile(patterns: &[String]) -> Result<GlobSet, RestoreError> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let malformed =
            |error: globset::Error| RestoreError::Pattern { pattern: pattern.clone(), why: error.kind().to_string() };
        let mut add = |text: &str| -> Result<(), RestoreError> {
            set.add(GlobBuilder::new(text).literal_separator(true).build().map_err(malformed)?);
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
    set.build().map_err(failed)
}
