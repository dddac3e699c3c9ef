//! Reading one entry: open, read, cut, hash; link targets and extended attributes.
//!
//! A file is opened without following links and without waiting, looked at before and after, and never read beyond the
//! length it had when it was opened. If anything about it changed meanwhile, it is saved as read, reported, and kept out
//! of the file cache.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Advice, FileType, OFlags, SeekFrom};
use rustix::io::Errno;
use strandline_actors::runtime::buffer::BlockBuffer;
use strandline_messages::format::chunk::chunk_id;
use strandline_messages::format::tree::Hole;
use strandline_messages::ids::ChunkKind;

use super::BackupError;
use super::items::{Node, NodeContent, PART_BYTES, Part, Step};
use super::progress::Progress;
use super::stream::Pipe;
use crate::cache::Identity;
use crate::chunk::{Cutter, INLINE_BYTES};
use crate::scan::dir::open_quietly;
use crate::scan::flush::Flusher;
use crate::scan::meta::{Meta, XattrReader, XattrTarget, XattrsFound, read_link, stat_fd};
use crate::scan::walk::errno_text;

/// Most holes kept of one file; later ones are read as zeros.
const HOLES_MAX: usize = 4096;
/// Bytes asked for in one read.
const READ_BYTES: usize = 256 << 10;
/// Files from this length on are announced to the kernel as read from front to back.
const SEQUENTIAL_BYTES_MIN: u64 = 256 << 10;

/// Takes finished parts.
pub type PartSink<'s> = &'s mut dyn FnMut(Part) -> Result<(), BackupError>;

/// Reads entries into parts. One per reading thread.
#[derive(Debug)]
pub struct FileReader<'a> {
    cutter: &'a Cutter,
    id_key: [u8; 32],
    progress: &'a Progress,
    flusher: &'a Flusher,
    xattrs: XattrReader,
    part: Part,
    weight: usize,
}

impl<'a> FileReader<'a> {
    /// With the repository's cutter and key of ids.
    pub fn new(cutter: &'a Cutter, id_key: [u8; 32], progress: &'a Progress, flusher: &'a Flusher) -> Self {
        let xattrs = XattrReader::default();
        Self { cutter, id_key, progress, flusher, xattrs, part: Part::default(), weight: 0 }
    }

    /// Shows where the next steps are.
    pub fn show(&self, batch: &[Step]) {
        if let Some(Step::Enter(node) | Step::Node(node)) = batch.iter().find(|step| step.needs_reading()) {
            self.progress.set_current_path(node.place.parent.path_of(&node.name));
        }
    }

    /// Does what `step` needs and appends it to the current part.
    pub fn process(&mut self, step: Step, out: PartSink<'_>) -> Result<(), BackupError> {
        let step = match step {
            Step::Enter(mut node) if matches!(node.content, NodeContent::Unread) => {
                let found = match &node.place.dir {
                    Some(dir) => dir.fd().map(|fd| self.xattrs.read(XattrTarget::Open(fd.as_fd()))),
                    None => self.xattrs_at(&node),
                };
                accept_xattrs(&mut node, found);
                node.content = NodeContent::None;
                Step::Enter(node)
            }
            Step::Node(node) => match node.content {
                NodeContent::Unread => self.node(node, out)?,
                NodeContent::Pipe(_) => self.pipe(node, out)?,
                NodeContent::SameInode => self.with_xattrs(node, NodeContent::SameInode),
                _ => Step::Node(node),
            },
            other => other,
        };
        if let Step::Enter(node) | Step::Node(node) = &step {
            self.weight += node.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum::<usize>() + 256;
        }
        self.part.steps.push((self.part.chunks.len(), step));
        if self.part.data.len() + self.weight >= PART_BYTES { self.flush(out) } else { Ok(()) }
    }

    /// Hands on the current part, if there is anything in it.
    pub fn flush(&mut self, out: PartSink<'_>) -> Result<(), BackupError> {
        self.weight = 0;
        if self.part.steps.is_empty() && self.part.chunks.is_empty() {
            return Ok(());
        }
        out(std::mem::take(&mut self.part))
    }

    fn xattrs_at(&mut self, node: &Node) -> Result<XattrsFound, Errno> {
        let fd = node.place.parent.fd()?;
        Ok(self.xattrs.read(XattrTarget::At(fd.as_fd(), &node.name)))
    }

    fn with_xattrs(&mut self, mut node: Box<Node>, content: NodeContent) -> Step {
        let found = self.xattrs_at(&node);
        accept_xattrs(&mut node, found);
        node.content = content;
        Step::Node(node)
    }

    fn node(&mut self, mut node: Box<Node>, out: PartSink<'_>) -> Result<Step, BackupError> {
        match node.meta.file_type() {
            FileType::RegularFile if node.meta.size == 0 => Ok(self.with_xattrs(node, NodeContent::Inline(Vec::new()))),
            FileType::RegularFile => match self.file(&mut node, out)? {
                Ok(()) => Ok(Step::Node(node)),
                Err(message) => Ok(problem(&node, message)),
            },
            FileType::Symlink => {
                let target = node.place.parent.fd().and_then(|fd| read_link(fd.as_fd(), &node.name));
                match target {
                    Ok(target) => Ok(self.with_xattrs(node, NodeContent::Target(target))),
                    Err(error) => Ok(problem(&node, errno_text(error, "the link could not be read"))),
                }
            }
            _ => Ok(self.with_xattrs(node, NodeContent::None)),
        }
    }

    // The outer error ends the backup; the inner one is about this file alone.
    fn file(&mut self, node: &mut Node, out: PartSink<'_>) -> Result<Result<(), String>, BackupError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = node.place.parent.fd().and_then(|parent| open_quietly(parent.as_fd(), &node.name, flags));
        let file = match opened {
            Ok(file) => file,
            Err(error) => return Ok(Err(errno_text(error, "could not be opened"))),
        };
        let fd = file.as_fd();
        self.progress.files_opened.add(1);
        let before = match stat_fd(fd) {
            Ok(before) if before.is_file() => before,
            Ok(_) => return Ok(Err(errno_text(Errno::STALE, "it is no regular file any more"))),
            Err(error) => return Ok(Err(errno_text(error, "its metadata could not be read"))),
        };
        node.meta = before;
        self.flusher.flush(before.device, fd);
        let found = self.xattrs.read(XattrTarget::Open(fd));
        accept_xattrs(node, Ok(found));
        if before.size >= SEQUENTIAL_BYTES_MIN {
            self.progress.set_current_path(node.place.parent.path_of(&node.name));
            // Advice only: a file system that ignores it is read all the same.
            let _ = rustix::fs::fadvise(fd, 0, None, Advice::Sequential);
        }
        let mut source = Source::new(fd, &before, self.cutter.minimum());
        let read = if before.size > self.cutter.minimum() as u64 {
            node.content = NodeContent::Streamed;
            self.stream(&mut source, out)?
        } else {
            self.small(&mut source, node)
        };
        if let Err(error) = read {
            return Ok(Err(errno_text(error, "its content could not be read")));
        }
        let unchanged = stat_fd(fd).is_ok_and(|after| Identity::of(&after) == Identity::of(&before));
        if !unchanged || source.offset != before.size {
            node.problems.push("changed while it was being read; it is saved as it was read".into());
            node.cacheable = false;
        }
        node.meta.size = source.offset;
        node.holes = source.holes;
        self.progress.files_read.add(1);
        self.progress.bytes_read.add(source.read);
        Ok(Ok(()))
    }

    // Whatever goes wrong ends the backup.
    fn pipe(&mut self, mut node: Box<Node>, out: PartSink<'_>) -> Result<Step, BackupError> {
        let NodeContent::Pipe(pipe) = std::mem::replace(&mut node.content, NodeContent::Streamed) else {
            return Ok(Step::Node(node));
        };
        let mut source = PipeSource { pipe, begun: BlockBuffer::default(), read: 0, failure: None };
        let begun = source.begin();
        if begun.is_ok() && source.begun.len() <= INLINE_BYTES {
            node.content = NodeContent::Inline(source.begun.to_vec());
        } else if begun.is_err() || self.stream(&mut source, out)?.is_err() {
            let failure = source.failure.map(|error| error.to_string()).unwrap_or_default();
            return Err(BackupError::Stream(failure));
        }
        node.meta.size = source.read;
        self.progress.files_read.add(1);
        self.progress.bytes_read.add(source.read);
        Ok(Step::Node(node))
    }

    fn small(&mut self, source: &mut Source<'_>, node: &mut Node) -> Result<(), Errno> {
        self.begin_data();
        let start = self.part.data.len();
        loop {
            match source.append(&mut self.part.data, READ_BYTES) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    self.part.data.truncate(start);
                    return Err(error);
                }
            }
        }
        let content = self.part.data.get(start..).unwrap_or_default();
        if content.len() <= INLINE_BYTES {
            node.content = NodeContent::Inline(content.to_vec());
            self.part.data.truncate(start);
        } else {
            let id = chunk_id(&self.id_key, ChunkKind::Data, content, &[]);
            self.part.chunks.push((id, u32::try_from(content.len()).unwrap_or(u32::MAX)));
            node.content = NodeContent::Streamed;
        }
        Ok(())
    }

    fn stream(&mut self, source: &mut dyn Bytes, out: PartSink<'_>) -> Result<Result<(), Errno>, BackupError> {
        self.begin_data();
        let maximum = self.cutter.maximum();
        let mut start = self.part.data.len();
        let mut ended = false;
        loop {
            while !ended && self.part.data.len() - start < maximum {
                match source.append(&mut self.part.data, READ_BYTES) {
                    Ok(read) => ended = read == 0,
                    Err(error) => {
                        self.part.data.truncate(start);
                        return Ok(Err(error));
                    }
                }
            }
            loop {
                let window = self.part.data.get(start..).unwrap_or_default();
                if window.is_empty() || (!ended && window.len() < maximum) {
                    break;
                }
                let window = window.get(..maximum).unwrap_or(window);
                let chunk = window.get(..self.cutter.first_chunk(window)).unwrap_or(window);
                let id = chunk_id(&self.id_key, ChunkKind::Data, chunk, &[]);
                self.part.chunks.push((id, u32::try_from(chunk.len()).unwrap_or(u32::MAX)));
                start += chunk.len();
            }
            if self.part.data.len() >= PART_BYTES {
                let mut next = self.buffer();
                next.extend_from_slice(self.part.data.get(start..).unwrap_or_default());
                self.part.data.truncate(start);
                self.flush(&mut *out)?;
                self.part.data = next;
                start = 0;
            }
            if ended {
                return Ok(Ok(()));
            }
        }
    }

    fn begin_data(&mut self) {
        if self.part.data.capacity() == 0 {
            self.part.data = self.buffer();
        }
    }

    fn buffer(&self) -> BlockBuffer {
        BlockBuffer::with_capacity(PART_BYTES + self.cutter.maximum() + READ_BYTES)
    }
}

fn accept_xattrs(node: &mut Node, found: Result<XattrsFound, Errno>) {
    let found = found.unwrap_or_else(|error| XattrsFound {
        xattrs: Vec::new(),
        problem: Some(format!("the extended attributes could not be listed: {error}")),
    });
    node.xattrs = found.xattrs;
    if let Some(problem) = found.problem {
        node.problems.push(problem);
        node.cacheable = false;
    }
}

fn problem(node: &Node, message: String) -> Step {
    Step::Problem { path: node.place.parent.path_of(&node.name), message }
}

/// Bytes to be cut.
trait Bytes {
    /// Appends up to `wanted` bytes; 0 at the end.
    fn append(&mut self, data: &mut BlockBuffer, wanted: usize) -> Result<usize, Errno>;
}

/// What comes through a pipe.
struct PipeSource {
    pipe: Pipe,
    /// Read ahead, to see whether it is more than stands in a directory entry.
    begun: BlockBuffer,
    read: u64,
    failure: Option<std::io::Error>,
}

impl PipeSource {
    fn begin(&mut self) -> Result<(), Errno> {
        let mut begun = BlockBuffer::default();
        while begun.len() <= INLINE_BYTES && self.read_more(&mut begun, READ_BYTES)? > 0 {}
        self.begun = begun;
        Ok(())
    }

    fn read_more(&mut self, data: &mut BlockBuffer, wanted: usize) -> Result<usize, Errno> {
        let start = data.len();
        let room = data.grow(wanted);
        let result = loop {
            match self.pipe.content.read(room) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        data.truncate(start + result.as_ref().map_or(0, |read| *read));
        match result {
            Ok(read) => {
                self.read += read as u64;
                Ok(read)
            }
            Err(error) => {
                self.failure = Some(error);
                Err(Errno::IO)
            }
        }
    }
}

impl Bytes for PipeSource {
    fn append(&mut self, data: &mut BlockBuffer, wanted: usize) -> Result<usize, Errno> {
        if self.begun.is_empty() {
            return self.read_more(data, wanted);
        }
        let begun = std::mem::take(&mut self.begun);
        data.extend_from_slice(&begun);
        Ok(begun.len())
    }
}

/// The bytes of a file outside of its holes, up to the length it had when it was opened.
struct Source<'a> {
    fd: BorrowedFd<'a>,
    /// Next byte to read; at the end, the length as saved.
    offset: u64,
    size: u64,
    segment_end: u64,
    holes: Vec<Hole>,
    read: u64,
}

impl<'a> Source<'a> {
    // Holes are looked for only where they can save a chunk: small files may show no blocks because they live in their
    // inode or have not been written back.
    fn new(fd: BorrowedFd<'a>, meta: &Meta, minimum: usize) -> Self {
        let sparse = meta.size > minimum as u64 && meta.blocks.saturating_mul(512) < meta.size;
        let segment_end = if sparse { 0 } else { meta.size };
        Self { fd, offset: 0, size: meta.size, segment_end, holes: Vec::new(), read: 0 }
    }

    // Skips a hole, if there is one and it can be recorded.
    fn next_segment(&mut self) {
        self.segment_end = self.size;
        if self.holes.len() >= HOLES_MAX {
            return;
        }
        let data = match rustix::fs::seek(self.fd, SeekFrom::Data(self.offset)) {
            Ok(data) => data.clamp(self.offset, self.size),
            Err(Errno::NXIO) => self.size,
            Err(_) => return,
        };
        if data > self.offset {
            self.holes.push(Hole { offset: self.offset, bytes: data - self.offset });
        }
        self.offset = data;
        if data < self.size
            && let Ok(hole) = rustix::fs::seek(self.fd, SeekFrom::Hole(data))
            && hole > data
        {
            self.segment_end = hole.min(self.size);
        }
    }
}

impl Bytes for Source<'_> {
    fn append(&mut self, data: &mut BlockBuffer, wanted: usize) -> Result<usize, Errno> {
        if self.offset >= self.segment_end && self.offset < self.size {
            self.next_segment();
        }
        let left = usize::try_from(self.segment_end.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        let wanted = wanted.min(left);
        if wanted == 0 {
            return Ok(0);
        }
        let start = data.len();
        let room = data.grow(wanted);
        let result = retry(|| rustix::io::pread(self.fd, &mut *room, self.offset));
        let read = result.as_ref().copied().unwrap_or(0);
        data.truncate(start + read);
        if result == Ok(0) {
            // It became shorter.
            self.size = self.offset;
            self.segment_end = self.offset;
        }
        self.offset += read as u64;
        self.read += read as u64;
        result
    }
}

fn retry(mut read: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match read() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}
