//! Verification: everything restored is read again from the disk and compared with the chunk ids of the snapshot.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{Advice, FileType, Mode, OFlags};
use strandline_messages::ChunkKind;
use strandline_messages::format::tree::{Content, EntryNode};

use super::attributes::Meta;
use super::directories::Directory;
use super::layout::Layout;
use super::report::count;
use super::{Overwrite, Restorer, walk_prefix, walkable};
use crate::trees::{DirEntry, Resolved, Step};

/// Walks the tree once more. What was recorded as not restored is passed over, and so is what was left by
/// [`Overwrite::Never`] (told by its size or time).
pub(super) fn run(restorer: &Restorer, top: &Arc<Directory>, start: &Resolved) {
    if let Ok(target) = restorer.handles.open_readable(top) {
        // So that the pages can be dropped and are read from the disk; an error only makes the check weaker.
        let _ = rustix::fs::syncfs(&target);
    }
    let missing = restorer.issues.not_restored();
    let prefix = walk_prefix(&restorer.options.subpath);
    let filter = &restorer.filter;
    let directory = match (walkable(start), start) {
        (Ok(Some(directory)), _) => directory,
        (Ok(None), Resolved::Entry(entry)) => {
            if missing.is_empty() {
                verify(restorer, top, &prefix, entry);
            }
            return;
        }
        _ => return,
    };
    let mut stack = vec![(Arc::clone(top), filter.includes_from_above(&prefix))];
    let mut walk = filter.walk(&restorer.reader, directory, &prefix);
    while let Some(item) = walk.next().filter(|_| !restorer.stopped()) {
        let Some((parent, inherited)) = stack.last() else { return };
        match item {
            Ok((path, Step::Enter(entry))) => {
                if filter.excludes(&path) || missing.contains(&path) {
                    walk.skip_directory();
                    continue;
                }
                let included = filter.includes(&path) || *inherited;
                if !included && !filter.leads_to_something(&path) {
                    walk.skip_directory();
                    continue;
                }
                stack.push((Directory::below(parent, Meta::new(path, &entry)), included));
            }
            Ok((_, Step::Leave)) => {
                stack.pop();
            }
            Ok((path, Step::Entry(entry))) => {
                if !missing.contains(&path) && !filter.excludes(&path) && (*inherited || filter.includes(&path)) {
                    verify(restorer, parent, &path, &entry);
                }
            }
            // Reported when it was restored.
            Err(_) => {}
        }
    }
}

fn verify(restorer: &Restorer, directory: &Arc<Directory>, path: &[u8], entry: &DirEntry) {
    match check(restorer, directory, entry) {
        Ok(Checked::Right) => count(&restorer.issues.progress.verified),
        Ok(Checked::NotOurs) => {}
        Ok(Checked::Wrong(why)) => restorer.issues.add(path, format!("read again, it is not what was saved: {why}")),
        Err(error) => restorer.issues.add(path, format!("it cannot be read again: {error}")),
    }
}

enum Checked {
    Right,
    Wrong(String),
    NotOurs,
}

fn check(restorer: &Restorer, directory: &Arc<Directory>, entry: &DirEntry) -> io::Result<Checked> {
    let EntryNode::File { size, content, holes } = &entry.entry.node else { return Ok(Checked::NotOurs) };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let never = restorer.options.overwrite == Overwrite::Never;
    let opened = restorer
        .handles
        .open(directory)
        .and_then(|handle| Ok(rustix::fs::openat(&*handle, entry.entry.name.as_slice(), flags, Mode::empty())?));
    let opened = match opened {
        Err(_) if never => return Ok(Checked::NotOurs),
        opened => opened?,
    };
    let stat = rustix::fs::fstat(&opened)?;
    let ours = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && u64::try_from(stat.st_size) == Ok(*size)
        && stat.st_mtime == entry.entry.mtime.seconds;
    match (ours, never) {
        (true, _) => {}
        (false, true) => return Ok(Checked::NotOurs),
        (false, false) => return Ok(Checked::Wrong("its size or time differs".into())),
    }
    // Only a hint: without it the bytes may come from memory.
    let _ = rustix::fs::fadvise(&opened, 0, None, Advice::DontNeed);
    let file = File::from(opened);
    let layout = Layout::new(*size, holes);
    if let Content::Inline(expected) = content {
        let mut found = vec![0; expected.len()];
        layout.read(&file, 0, &mut found)?;
        return Ok(if found == *expected { Checked::Right } else { Checked::Wrong("its bytes differ".into()) });
    }
    let mut offset = 0u64;
    let mut found = Vec::new();
    for piece in restorer.reader.pieces(entry) {
        let (id, bytes) = match piece {
            Ok(piece) => piece,
            Err(error) => return Ok(Checked::Wrong(error.to_string())),
        };
        found.resize(bytes as usize, 0);
        layout.read(&file, offset, &mut found)?;
        if restorer.keyset.chunk_id(ChunkKind::Data, &found, &[]) != id {
            return Ok(Checked::Wrong(format!("{bytes} bytes at {offset} of its content differ")));
        }
        offset = offset.saturating_add(bytes.into());
    }
    Ok(Checked::Right)
}
