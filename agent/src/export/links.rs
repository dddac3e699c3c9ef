//! Which inodes an archive holds already, and under which path: on disk, so that memory does not grow with their number.
//!
//! A private temporary directory has one small file for each inode with several names of which not all have come yet:
//! how many came (`u32`), then the path of the first.

use std::fs;
use std::io;
use std::path::PathBuf;

use strandline_messages::format::tree::Entry;
use tempfile::TempDir;

pub(super) struct Links {
    below: PathBuf,
    directory: Option<TempDir>,
}

impl Links {
    /// Remembers in a temporary directory below `below`, made when it is first needed and removed at the end.
    pub(super) fn new(below: PathBuf) -> Self {
        Self { below, directory: None }
    }

    /// The path under which the inode of `entry` stands in the archive already; `None` if this is its first name.
    pub(super) fn earlier(&mut self, entry: &Entry, path: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let directory = match &mut self.directory {
            Some(directory) => directory,
            empty => empty.insert(TempDir::with_prefix_in("links-", &self.below)?),
        };
        let name = directory.path().join(format!("{:x}-{:x}", entry.device, entry.inode));
        let known = match fs::read(&name) {
            Ok(known) => known,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::write(&name, record(1, path))?;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let Some((came, first)) = known.split_first_chunk::<4>() else {
            return Err(io::Error::other(format!("{} is damaged", name.display())));
        };
        let came = u32::from_le_bytes(*came).saturating_add(1);
        if came >= entry.links {
            fs::remove_file(&name)?;
        } else {
            fs::write(&name, record(came, first))?;
        }
        Ok(Some(first.to_vec()))
    }
}

fn record(came: u32, path: &[u8]) -> Vec<u8> {
    [&came.to_le_bytes(), path].concat()
}

#[cfg(test)]
mod tests {
    use strandline_messages::format::tree::{EntryNode, Timestamp};

    use super::*;

    #[test]
    fn the_first_path_is_remembered_until_all_names_came() {
        let scratch = tempfile::tempdir().unwrap();
        let entry = |inode| Entry {
            name: b"n".to_vec(),
            mode: 0o644,
            owner: 0,
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            inode,
            device: 1,
            links: 3,
            xattrs: Vec::new(),
            node: EntryNode::Fifo,
        };
        let mut links = Links::new(scratch.path().to_owned());
        assert_eq!(links.earlier(&entry(1), b"a/\xff").unwrap(), None);
        assert_eq!(links.earlier(&entry(2), b"other").unwrap(), None);
        assert_eq!(links.earlier(&entry(1), b"b").unwrap().unwrap(), b"a/\xff");
        assert_eq!(links.earlier(&entry(1), b"c").unwrap().unwrap(), b"a/\xff");
        let left = links.directory.as_ref().unwrap().path().to_owned();
        assert_eq!(fs::read_dir(&left).unwrap().count(), 1, "complete inodes are forgotten");
        drop(links);
        assert!(!left.exists());
    }
}
