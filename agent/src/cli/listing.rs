//! How entries of snapshots are shown: for people as `ls -l` does, for programs as one object each.

use serde::Serialize;
use strandline_messages::format::tree::EntryNode;

use super::output;
use crate::trees::DirEntry;

/// An entry for programs.
#[derive(Serialize)]
pub struct Line {
    path: String,
    #[serde(rename = "type")]
    kind: &'static str,
    mode: String,
    uid: u32,
    gid: u32,
    user: String,
    group: String,
    size: u64,
    mtime: String,
    inode: u64,
    links: u32,
    target: Option<String>,
}

impl Line {
    /// The entry at `path`, which comes without leading `/`.
    pub fn new(path: &[u8], entry: &DirEntry) -> Self {
        let (owner, e) = (entry.owner(), &entry.entry);
        Self {
            path: shown(path),
            kind: kind(entry),
            mode: format!("{:04o}", e.mode),
            uid: owner.uid,
            gid: owner.gid,
            user: output::path(&owner.user),
            group: output::path(&owner.group),
            size: size(entry),
            mtime: output::rfc3339(mtime_ns(entry)),
            inode: e.inode,
            links: e.links,
            target: target(entry),
        }
    }
}

/// A path in a snapshot for people.
pub fn shown(path: &[u8]) -> String {
    format!("/{}", output::path(path))
}

/// One line as `ls -l` writes it, devices with their numbers in place of a size; `human`: sizes with units.
pub fn long(path: &[u8], entry: &DirEntry, human: bool) -> String {
    let (owner, e) = (entry.owner(), &entry.entry);
    let name = |name: &[u8], number: u32| {
        if name.is_empty() { number.to_string() } else { output::path(name) }
    };
    let target = target(entry).map(|target| format!(" -> {target}")).unwrap_or_default();
    let size = match e.node {
        EntryNode::CharDevice { major, minor } | EntryNode::BlockDevice { major, minor } => format!("{major}, {minor}"),
        _ if human => output::size(size(entry)),
        _ => size(entry).to_string(),
    };
    format!(
        "{}{} {:>8} {:>8} {size:>12} {} {}{target}\n",
        letter(entry),
        permissions(e.mode),
        name(&owner.user, owner.uid),
        name(&owner.group, owner.gid),
        output::moment(mtime_ns(entry)),
        shown(path),
    )
}

/// The type in one word.
pub fn kind(entry: &DirEntry) -> &'static str {
    match entry.entry.node {
        EntryNode::File { .. } => "file",
        EntryNode::Directory { .. } => "dir",
        EntryNode::Symlink { .. } => "symlink",
        EntryNode::Fifo => "fifo",
        EntryNode::Socket => "socket",
        EntryNode::CharDevice { .. } => "chardev",
        EntryNode::BlockDevice { .. } => "blockdev",
    }
}

fn mtime_ns(entry: &DirEntry) -> i64 {
    let mtime = entry.entry.mtime;
    mtime.seconds.saturating_mul(1_000_000_000).saturating_add(mtime.nanos.into())
}

fn letter(entry: &DirEntry) -> char {
    match entry.entry.node {
        EntryNode::File { .. } => '-',
        EntryNode::Directory { .. } => 'd',
        EntryNode::Symlink { .. } => 'l',
        EntryNode::Fifo => 'p',
        EntryNode::Socket => 's',
        EntryNode::CharDevice { .. } => 'c',
        EntryNode::BlockDevice { .. } => 'b',
    }
}

fn size(entry: &DirEntry) -> u64 {
    match entry.entry.node {
        EntryNode::File { size, .. } => size,
        _ => 0,
    }
}

fn target(entry: &DirEntry) -> Option<String> {
    match &entry.entry.node {
        EntryNode::Symlink { target } => Some(output::path(target)),
        _ => None,
    }
}

/// `rwxr-xr-x` with set-id and sticky bits, as `ls -l` writes it.
fn permissions(mode: u16) -> String {
    let mut text = String::with_capacity(9);
    for (shift, special, set, unset) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')] {
        let bits = mode >> shift;
        text.push(if bits & 4 == 0 { '-' } else { 'r' });
        text.push(if bits & 2 == 0 { '-' } else { 'w' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => set,
            (false, true) => unset,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_read_like_those_of_ls() {
        assert_eq!(permissions(0o755), "rwxr-xr-x");
        assert_eq!(permissions(0o4755), "rwsr-xr-x");
        assert_eq!(permissions(0o1777), "rwxrwxrwt");
        assert_eq!(permissions(0o2640), "rw-r-S---");
    }
}
