//! The paths that the user gave, as one tree from `/` down, so that nested and repeated ones are merged.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One component of the paths given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootNode {
    /// The components below.
    pub children: BTreeMap<Vec<u8>, Arc<RootNode>>,
    /// Whether a given path ends here: everything below is wanted.
    pub root: bool,
    /// Whether a symbolic link here is looked through: a component on the way, or a path given with a trailing slash.
    pub follow: bool,
}

impl RootNode {
    /// Merges `paths`. Relative ones start at `current`. `.` and `..` are resolved by text, as restic does.
    pub fn merge(paths: &[PathBuf], current: &Path) -> Arc<Self> {
        let mut top = Self::default();
        for path in paths {
            let joined = current.join(path);
            let bytes = joined.as_os_str().as_bytes();
            let follow = bytes.ends_with(b"/") || bytes.ends_with(b"/.");
            let mut components: Vec<&[u8]> = Vec::new();
            for part in bytes.split(|&byte| byte == b'/') {
                match part {
                    b"" | b"." => {}
                    b".." => drop(components.pop()),
                    name => components.push(name),
                }
            }
            top.insert(&components, follow);
        }
        Arc::new(top)
    }

    fn insert(&mut self, components: &[&[u8]], follow: bool) {
        let mut node = self;
        for (index, name) in components.iter().enumerate() {
            node = Arc::make_mut(node.children.entry(name.to_vec()).or_default());
            node.follow |= follow || index + 1 < components.len();
        }
        node.root = true;
    }

    /// The full paths of the roots at and below this node, whose own path is `path`.
    pub fn root_paths(&self, path: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut todo = vec![(self, path.to_owned())];
        while let Some((node, path)) = todo.pop() {
            for (name, child) in &node.children {
                todo.push((child, path.join(OsStr::from_bytes(name))));
            }
            if node.root {
                found.push(path);
            }
        }
        found.sort();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_repeated_and_relative_paths_are_merged() {
        let paths = ["/usr/share", "/usr", "doc/../doc", "/home/me/doc", "/x/./y/"].map(PathBuf::from);
        let tree = RootNode::merge(&paths, Path::new("/home/me"));
        let roots = tree.root_paths(Path::new("/"));
        assert_eq!(roots, ["/home/me/doc", "/usr", "/usr/share", "/x/y"].map(PathBuf::from));
        assert!(tree.children.get(&b"x"[..]).unwrap().children.get(&b"y"[..]).unwrap().follow);
        assert!(RootNode::merge(&["/..".into()], Path::new("/")).root);
    }
}
