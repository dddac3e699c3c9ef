//! What travels from the feeder through the readers to the assembler.

use std::sync::Arc;

use crossbeam_channel::Receiver;
use strandline_actors::runtime::buffer::BlockBuffer;
use strandline_messages::format::tree::{Hole, Xattr};
use strandline_messages::ids::ChunkId;

use super::stream::Pipe;
use crate::cache::FilePiece;
use crate::scan::dir::Dir;
use crate::scan::meta::Meta;
use crate::scan::names::Name;

/// Bytes at which a part is handed on.
pub const PART_BYTES: usize = 1 << 20;

/// One entry of the source.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: Name,
    /// Its metadata.
    pub meta: Meta,
    /// Its extended attributes.
    pub xattrs: Vec<Xattr>,
    /// Its holes, if it is a file.
    pub holes: Vec<Hole>,
    /// Its content.
    pub content: NodeContent,
    /// Whether the file cache may say next time that it is unchanged.
    pub cacheable: bool,
    /// Whether it was taken from the file cache.
    pub unchanged: bool,
    /// What could not be saved as it is.
    pub problems: Vec<String>,
    /// Where it is.
    pub place: Place,
}

/// Where an entry is.
#[derive(Clone, Debug)]
pub struct Place {
    /// The directory it is in.
    pub parent: Arc<Dir>,
    /// Itself, if it is an open directory.
    pub dir: Option<Arc<Dir>>,
}

/// What an entry holds.
#[derive(Debug)]
pub enum NodeContent {
    /// Not looked at yet.
    Unread,
    /// Nothing of its own: directories, devices, pipes, sockets.
    None,
    /// The target of a symbolic link.
    Target(Vec<u8>),
    /// The bytes of a small file.
    Inline(Vec<u8>),
    /// Whatever comes through the pipe, still to be read.
    Pipe(Pipe),
    /// Chunks, from the file cache.
    Pieces(Vec<FilePiece>),
    /// A content list, from the file cache.
    List(ChunkId),
    /// The chunks that came just before in the same parts.
    Streamed,
    /// The same as an earlier entry with the same device and inode.
    SameInode,
}

/// One step of the assembly.
#[derive(Debug)]
pub enum Step {
    /// A directory begins.
    Enter(Box<Node>),
    /// It ends.
    Leave,
    /// Anything that is not a directory.
    Node(Box<Node>),
    /// Something is not in the snapshot.
    Problem {
        /// Full path, raw.
        path: Vec<u8>,
        /// What happened, for people.
        message: String,
    },
}

impl Step {
    /// Whether a reader has something to do for it.
    pub fn needs_reading(&self) -> bool {
        match self {
            Self::Enter(node) | Self::Node(node) => {
                matches!(node.content, NodeContent::Unread | NodeContent::SameInode | NodeContent::Pipe(_))
            }
            Self::Leave | Self::Problem { .. } => false,
        }
    }
}

/// About a megabyte of file content, and the steps that it completes.
#[derive(Debug, Default)]
pub struct Part {
    /// Chunks, one after the other.
    pub data: BlockBuffer,
    /// Their ids and lengths.
    pub chunks: Vec<(ChunkId, u32)>,
    /// Each step with the number of this part's chunks that come before its end.
    pub steps: Vec<(usize, Step)>,
}

/// What the assembler takes next: parts that are there, or parts that a reader is making.
#[derive(Debug)]
pub enum Ordered {
    /// Nothing had to be read.
    Ready(Part),
    /// As they come, until the reader is done.
    Parts(Receiver<Part>),
}
