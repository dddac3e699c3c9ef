//! An entry as archives see it: everything but its content, independent of the tree node that it came from.

use strandline_messages::format::tree::{EntryNode, Hole, Owner, Timestamp, Xattr};

use crate::trees::DirEntry;

/// One name of an archive.
#[derive(Clone, Debug)]
pub(super) struct Item {
    /// Relative path without trailing `/`; `.` for the directory that is exported itself.
    pub(super) path: Vec<u8>,
    /// Permission bits with set-id and sticky.
    pub(super) mode: u16,
    pub(super) owner: Owner,
    pub(super) mtime: Timestamp,
    pub(super) xattrs: Vec<Xattr>,
    pub(super) kind: Kind,
}

/// What it is.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    File {
        /// Holes included.
        size: u64,
        holes: Vec<Hole>,
    },
    Directory,
    Symlink(Vec<u8>),
    /// Another name of the file at this path, which stands earlier in the archive.
    HardLink(Vec<u8>),
    Fifo,
    Socket,
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
}

impl Item {
    pub(super) fn new(path: Vec<u8>, entry: &DirEntry) -> Self {
        let owner = entry.owner();
        let entry = &entry.entry;
        let kind = match &entry.node {
            EntryNode::File { size, holes, .. } => Kind::File { size: *size, holes: holes.clone() },
            EntryNode::Directory { .. } => Kind::Directory,
            EntryNode::Symlink { target } => Kind::Symlink(target.clone()),
            EntryNode::Fifo => Kind::Fifo,
            EntryNode::Socket => Kind::Socket,
            EntryNode::CharDevice { major, minor } => Kind::CharDevice(*major, *minor),
            EntryNode::BlockDevice { major, minor } => Kind::BlockDevice(*major, *minor),
        };
        Self { path, mode: entry.mode, owner, mtime: entry.mtime, xattrs: entry.xattrs.clone(), kind }
    }

    /// Bytes of memory that it takes, about.
    pub(super) fn memory_bytes(&self) -> u64 {
        let xattrs: usize = self.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len() + 64).sum();
        let kind = match &self.kind {
            Kind::File { holes, .. } => holes.len() * 16,
            Kind::Symlink(target) | Kind::HardLink(target) => target.len(),
            _ => 0,
        };
        (self.path.len() + xattrs + kind + 256) as u64
    }

    /// Bytes of the content stream: the file's size without its holes; nothing of anything else.
    pub(super) fn content_bytes(&self) -> u64 {
        match &self.kind {
            Kind::File { size, holes } => {
                segments(*size, holes).fold(0, |sum, (_, bytes)| u64::saturating_add(sum, bytes))
            }
            _ => 0,
        }
    }
}

/// The parts of a file outside of its holes, ascending: offset and length, none of them empty.
pub(super) fn segments(size: u64, holes: &[Hole]) -> impl Iterator<Item = (u64, u64)> {
    let starts = std::iter::once(0).chain(holes.iter().map(|hole| hole.offset.saturating_add(hole.bytes)));
    let ends = holes.iter().map(|hole| hole.offset).chain([size]);
    starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| (start, end - start))
}

/// Puts a content stream around the holes of its file, which become zeros.
pub(super) struct Spread {
    holes: std::iter::Peekable<std::vec::IntoIter<Hole>>,
    position: u64,
    size: u64,
}

/// What holes are filled with.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl Spread {
    pub(super) fn new(size: u64, holes: Vec<Hole>) -> Self {
        Self { holes: holes.into_iter().peekable(), position: 0, size }
    }

    /// The next bytes of the content stream.
    pub(super) fn feed<E>(&mut self, mut bytes: &[u8], mut put: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        while !bytes.is_empty() {
            self.fill_holes(&mut put)?;
            let room = self.holes.peek().map_or(u64::MAX, |hole| hole.offset - self.position);
            let (now, rest) = bytes.split_at(usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len()));
            put(now)?;
            self.position = self.position.saturating_add(now.len() as u64);
            bytes = rest;
        }
        Ok(())
    }

    /// The content stream is over: the holes that are left.
    pub(super) fn finish<E>(mut self, mut put: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        self.fill_holes(&mut put)?;
        debug_assert!(self.position <= self.size, "content streams are cut to their length");
        Ok(())
    }

    fn fill_holes<E>(&mut self, put: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        while let Some(hole) = self.holes.next_if(|hole| hole.offset <= self.position) {
            let end = hole.offset.saturating_add(hole.bytes).min(self.size);
            zeros(end.saturating_sub(self.position), put)?;
            self.position = self.position.max(end);
        }
        Ok(())
    }
}

/// So many zeros.
pub(super) fn zeros<E>(mut bytes: u64, put: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
    while bytes > 0 {
        let now = usize::try_from(bytes).unwrap_or(usize::MAX).min(ZEROS.len());
        put(ZEROS.get(..now).unwrap_or(&ZEROS))?;
        bytes -= now as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(size: u64, holes: &[(u64, u64)], pieces: &[&[u8]]) -> Vec<u8> {
        let holes = holes.iter().map(|(offset, bytes)| Hole { offset: *offset, bytes: *bytes }).collect();
        let (mut spread, mut out) = (Spread::new(size, holes), Vec::new());
        let mut put = |bytes: &[u8]| -> Result<(), ()> {
            out.extend_from_slice(bytes);
            Ok(())
        };
        for piece in pieces {
            spread.feed(piece, &mut put).unwrap();
        }
        spread.finish(&mut put).unwrap();
        out
    }

    #[test]
    fn content_goes_around_the_holes_which_become_zeros() {
        assert_eq!(spread(5, &[], &[b"ab", b"cde"]), b"abcde");
        assert_eq!(spread(9, &[(0, 2), (4, 3)], &[b"abc", b"d"]), b"\0\0ab\0\0\0cd");
        assert_eq!(spread(6, &[(2, 4)], &[b"ab"]), b"ab\0\0\0\0");
        assert_eq!(spread(3, &[(0, 3)], &[]), b"\0\0\0");
        assert_eq!(spread(200_000, &[(1, 199_999)], &[b"x"]).len(), 200_000);
    }

    #[test]
    fn segments_are_what_holes_leave() {
        let hole = |offset, bytes| Hole { offset, bytes };
        let all = |size, holes: &[Hole]| segments(size, holes).collect::<Vec<_>>();
        assert_eq!(all(10, &[]), [(0, 10)]);
        assert_eq!(all(0, &[]), []);
        assert_eq!(all(10, &[hole(0, 2), hole(4, 1), hole(8, 2)]), [(2, 2), (5, 3)]);
        assert_eq!(all(10, &[hole(0, 10)]), []);
    }
}
