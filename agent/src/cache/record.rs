//! One record of the cache and its bytes.

use strandline_messages::format::FormatError;
use strandline_messages::format::cursor::{Decoder, Encoder};
use strandline_messages::format::tree::{Hole, Timestamp, Xattr};
use strandline_messages::ids::ChunkId;
use strandline_messages::limits;

use super::PIECES_MAX;
use crate::scan::meta::Meta;

/// What must be equal for a file to be the same file, unchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Type and permissions.
    pub mode: u32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Modification time.
    pub mtime: Timestamp,
    /// Status change time.
    pub ctime: Timestamp,
    /// Inode number.
    pub inode: u64,
}

impl Identity {
    /// The identity that `meta` shows.
    pub fn of(meta: &Meta) -> Self {
        let Meta { mode, uid, gid, size, mtime, ctime, inode, .. } = *meta;
        Self { mode, uid, gid, size, mtime, ctime, inode }
    }
}

/// A chunk of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilePiece {
    /// The chunk.
    pub id: ChunkId,
    /// Its length, bytes.
    pub bytes: u32,
}

/// What a record knows of the content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CachedContent {
    /// There is none: directories, devices, pipes, sockets.
    None,
    /// The content of a small file, or the target of a symbolic link.
    Inline(Vec<u8>),
    /// At most [`PIECES_MAX`] chunks.
    Pieces(Vec<FilePiece>),
    /// The top node of a content list.
    List(ChunkId),
}

/// One entry of the last run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it looked like.
    pub identity: Identity,
    /// Its extended attributes.
    pub xattrs: Vec<Xattr>,
    /// Its holes.
    pub holes: Vec<Hole>,
    /// Its content.
    pub content: CachedContent,
}

/// `depth LEB128 · directory u8 · name`: what the join looks at before anything else.
pub(super) struct Key<'a> {
    pub depth: u64,
    pub directory: bool,
    pub name: &'a [u8],
}

impl<'a> Key<'a> {
    pub fn decode(decoder: &mut Decoder<'a>) -> Result<Self, FormatError> {
        let depth = decoder.varint()?;
        let directory = decoder.u8()? != 0;
        Ok(Self { depth, directory, name: decoder.string("file name", limits::FILE_NAME_BYTES_MAX)? })
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_varint(self.depth);
        out.put_u8(self.directory.into());
        out.put_string(self.name);
    }
}

fn put_time(time: Timestamp, out: &mut Vec<u8>) {
    out.put_zigzag(time.seconds);
    out.put_varint(time.nanos.into());
}

fn time(decoder: &mut Decoder<'_>) -> Result<Timestamp, FormatError> {
    Ok(Timestamp { seconds: decoder.zigzag()?, nanos: number(decoder)? })
}

fn number(decoder: &mut Decoder<'_>) -> Result<u32, FormatError> {
    u32::try_from(decoder.varint()?).map_err(|_| decoder.invalid("a number exceeds 32 bits"))
}

impl Record {
    pub(super) fn encode(
        identity: &Identity,
        xattrs: &[Xattr],
        holes: &[Hole],
        content: CachedContentRef<'_>,
        out: &mut Vec<u8>,
    ) {
        out.put_varint(identity.mode.into());
        out.put_varint(identity.uid.into());
        out.put_varint(identity.gid.into());
        out.put_varint(identity.size);
        put_time(identity.mtime, out);
        put_time(identity.ctime, out);
        out.put_varint(identity.inode);
        out.put_varint(xattrs.len() as u64);
        for xattr in xattrs {
            out.put_string(&xattr.name);
            out.put_string(&xattr.value);
        }
        out.put_varint(holes.len() as u64);
        for hole in holes {
            out.put_varint(hole.offset);
            out.put_varint(hole.bytes);
        }
        match content {
            CachedContentRef::None => out.put_u8(0),
            CachedContentRef::Inline(bytes) => {
                out.put_u8(1);
                out.put_string(bytes);
            }
            CachedContentRef::Pieces(pieces) => {
                out.put_u8(2);
                out.put_varint(pieces.len() as u64);
                for piece in pieces {
                    out.extend_from_slice(piece.id.as_bytes());
                    out.put_varint(piece.bytes.into());
                }
            }
            CachedContentRef::List(id) => {
                out.put_u8(3);
                out.extend_from_slice(id.as_bytes());
            }
        }
    }

    pub(super) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let identity = Identity {
            mode: number(decoder)?,
            uid: number(decoder)?,
            gid: number(decoder)?,
            size: decoder.varint()?,
            mtime: time(decoder)?,
            ctime: time(decoder)?,
            inode: decoder.varint()?,
        };
        let count = decoder.count("extended attributes", limits::XATTRS_MAX)?;
        let mut xattrs = Vec::with_capacity(count.min(decoder.remaining()));
        for _ in 0..count {
            let name = decoder.string("extended attribute name", limits::XATTR_NAME_BYTES_MAX)?.to_vec();
            let value = decoder.string("extended attribute value", limits::XATTR_VALUE_BYTES_MAX)?.to_vec();
            xattrs.push(Xattr { name, value });
        }
        let count = decoder.count("holes", limits::TREE_ENTRIES_MAX)?;
        let mut holes = Vec::with_capacity(count.min(decoder.remaining()));
        for _ in 0..count {
            holes.push(Hole { offset: decoder.varint()?, bytes: decoder.varint()? });
        }
        let content = match decoder.u8()? {
            0 => CachedContent::None,
            1 => CachedContent::Inline(decoder.string("inline content", limits::INLINE_BYTES_MAX)?.to_vec()),
            2 => {
                let count = decoder.count("pieces", PIECES_MAX)?;
                let mut pieces = Vec::with_capacity(count.min(decoder.remaining()));
                for _ in 0..count {
                    pieces.push(FilePiece { id: ChunkId(decoder.array()?), bytes: number(decoder)? });
                }
                CachedContent::Pieces(pieces)
            }
            3 => CachedContent::List(ChunkId(decoder.array()?)),
            _ => return Err(decoder.invalid("unknown content kind")),
        };
        Ok(Self { identity, xattrs, holes, content })
    }
}

/// Content of a record to be written.
#[derive(Clone, Copy, Debug)]
pub enum CachedContentRef<'a> {
    /// There is none.
    None,
    /// The content of a small file, or the target of a symbolic link.
    Inline(&'a [u8]),
    /// At most [`PIECES_MAX`] chunks.
    Pieces(&'a [FilePiece]),
    /// The top node of a content list.
    List(ChunkId),
}
