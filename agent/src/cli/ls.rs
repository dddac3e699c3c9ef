//! `strand ls`.

use serde::Serialize;
use strandline_messages::format::tree::EntryNode;

use super::Fate;
use super::args::{Global, Ls};
use super::output;
use super::repository::Opened;
use super::selector;
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::trees::{DirEntry, Resolved, Step, TreeReader};

/// Opened tree blocks kept, bytes.
const CACHE_BYTES: usize = 32 << 20;

#[derive(Serialize)]
struct Line {
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

/// Runs the command.
pub async fn run(global: &Global, place: &Place, ls: &Ls) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let listed = list(global, &opened, ls).await;
    let closed = opened.server.close().await;
    let problems = listed?;
    closed?;
    Ok(if problems == 0 { Fate::Done } else { Fate::Partial })
}

async fn list(global: &Global, opened: &Opened, ls: &Ls) -> anyhow::Result<u64> {
    let (wanted, path) = selector::split(&ls.snapshot);
    let snapshot = selector::one(opened, wanted).await?;
    let reading = Reading::open(opened, STREAMS).await?;
    let reader = TreeReader::new(reading.source(snapshot.id), CACHE_BYTES);
    let (json, long) = (global.json, ls.long);
    let walking = tokio::task::spawn_blocking(move || walk(&reader, snapshot.manifest.root, &path, json, long)).await;
    reading.close(opened, "").await;
    walking?
}

/// Prints everything below `path`; returns how many parts of the tree could not be read.
fn walk(
    reader: &TreeReader,
    root: strandline_messages::ChunkId,
    path: &[u8],
    json: bool,
    long: bool,
) -> anyhow::Result<u64> {
    let (top, prefix) = match reader.resolve(root, path)? {
        Resolved::Root(top) => (top, Vec::new()),
        Resolved::Entry(entry) => {
            print(path, &entry, json, long)?;
            match entry.directory_top()? {
                Some(top) => (top, path.to_vec()),
                None => return Ok(0),
            }
        }
    };
    let mut problems = 0;
    for step in reader.walk(top, &prefix) {
        match step {
            Ok((path, Step::Enter(entry) | Step::Entry(entry))) => print(&path, &entry, json, long)?,
            Ok((_, Step::Leave)) => {}
            Err(error) => {
                problems += 1;
                output::error(json, Fate::Partial.code(), &error.to_string());
            }
        }
    }
    Ok(problems)
}

fn print(path: &[u8], entry: &DirEntry, json: bool, long: bool) -> anyhow::Result<()> {
    let shown = format!("/{}", output::path(path));
    if json {
        return output::json_line(&line(shown, entry));
    }
    if !long {
        return output::print(format!("{shown}\n").as_bytes());
    }
    let (owner, e) = (entry.owner(), &entry.entry);
    let name = |name: &[u8], number: u32| {
        if name.is_empty() { number.to_string() } else { output::path(name) }
    };
    let target = target(entry).map(|target| format!(" -> {target}")).unwrap_or_default();
    let time = output::moment(e.mtime.seconds.saturating_mul(1_000_000_000).saturating_add(e.mtime.nanos.into()));
    let line = format!(
        "{}{} {:>8} {:>8} {:>12} {time} {shown}{target}\n",
        letter(entry),
        permissions(e.mode),
        name(&owner.user, owner.uid),
        name(&owner.group, owner.gid),
        size(entry),
    );
    output::print(line.as_bytes())
}

fn line(path: String, entry: &DirEntry) -> Line {
    let (owner, e) = (entry.owner(), &entry.entry);
    Line {
        path,
        kind: kind(entry),
        mode: format!("{:04o}", e.mode),
        uid: owner.uid,
        gid: owner.gid,
        user: output::path(&owner.user),
        group: output::path(&owner.group),
        size: size(entry),
        mtime: output::rfc3339(e.mtime.seconds.saturating_mul(1_000_000_000).saturating_add(e.mtime.nanos.into())),
        inode: e.inode,
        links: e.links,
        target: target(entry),
    }
}

fn kind(entry: &DirEntry) -> &'static str {
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
