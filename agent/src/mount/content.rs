//! Reading file content: a range of a file through its holes, its pieces and the chunks.

use std::sync::Arc;

use strandline_messages::format::tree::ListKind;
use strandline_messages::{ChunkId, SnapshotId};

use super::chunks::Chunks;
use super::extents::Extents;
use super::item::{Content, Piece};
use super::leaves::{Leaves, Part};
use super::readers::Readers;
use super::why_not_read;

/// Longest read that is answered, bytes: more than any kernel asks for at once.
const READ_BYTES_MAX: u64 = 16 << 20;

/// See the module. Shared by all workers.
pub(super) struct Contents {
    readers: Arc<Readers>,
    chunks: Chunks,
    lists: Leaves<Piece>,
}

/// A part of a chunk and where it goes in the answer.
struct Want {
    piece: Piece,
    skip: usize,
    place: usize,
    bytes: usize,
}

impl Contents {
    pub(super) fn new(readers: Arc<Readers>, chunks: Chunks) -> Self {
        Self { readers, chunks, lists: Leaves::default() }
    }

    /// Bytes from `offset` on, `bytes` of them or up to the end of the file. An error is for people, and names the block
    /// where one is to blame; no wrong byte is ever returned.
    pub(super) fn read(
        &self,
        snapshot: SnapshotId,
        extents: &Extents,
        content: &Content,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, String> {
        let end = extents.size().min(offset.saturating_add(bytes.min(READ_BYTES_MAX)));
        let length = usize::try_from(end.saturating_sub(offset)).unwrap_or(0);
        let mut answer = vec![0; length];
        let mut wants = Vec::new();
        let mut at = offset;
        while let Some(stretch) = extents.at(at).filter(|_| at < end) {
            let part = stretch.end.min(end) - at;
            let place = usize::try_from(at - offset).unwrap_or(usize::MAX);
            match (stretch.stream, content) {
                (None, _) => {}
                (Some(stream), Content::Inline(inline)) => {
                    let source = range(stream, part).and_then(|range| inline.get(range));
                    fill(&mut answer, place, source.ok_or_else(too_short)?)?;
                }
                (Some(stream), content) => {
                    self.pieces(snapshot, content, stream, stream + part, |piece| {
                        let from = stream.max(piece.start);
                        let to = (stream + part).min(piece.start + u64::from(piece.bytes));
                        let number = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
                        wants.push(Want {
                            piece,
                            skip: number(from - piece.start),
                            place: place.saturating_add(number(from - stream)),
                            bytes: number(to - from),
                        });
                    })?;
                }
            }
            at += part;
        }
        self.fill_from_chunks(snapshot, &wants, &mut answer)?;
        Ok(answer)
    }

    fn fill_from_chunks(&self, snapshot: SnapshotId, wants: &[Want], answer: &mut [u8]) -> Result<(), String> {
        let ids: Vec<ChunkId> = wants.iter().map(|want| want.piece.id).collect();
        for (want, chunk) in wants.iter().zip(self.chunks.get(snapshot, &ids)) {
            let chunk = chunk.map_err(|reason| reason.to_string())?;
            if chunk.len() != want.piece.bytes as usize {
                return Err("a chunk has another length than the file's list of pieces says".to_owned());
            }
            let source = chunk.get(want.skip..).and_then(|rest| rest.get(..want.bytes));
            fill(answer, want.place, source.ok_or_else(too_short)?)?;
        }
        Ok(())
    }

    /// Fetches the chunks of a range of the file ahead of need. What cannot be had is told to whoever reads it.
    pub(super) fn prefetch(
        &self,
        snapshot: SnapshotId,
        extents: &Extents,
        content: &Content,
        range: std::ops::Range<u64>,
    ) {
        let end = extents.size().min(range.end);
        let mut at = range.start;
        let mut ids = Vec::new();
        while let Some(stretch) = extents.at(at).filter(|_| at < end) {
            let part = stretch.end.min(end) - at;
            if let Some(stream) = stretch.stream
                && self.pieces(snapshot, content, stream, stream + part, |piece| ids.push(piece.id)).is_err()
            {
                break;
            }
            at += part;
        }
        self.chunks.prefetch(snapshot, &ids);
    }

    /// The pieces that hold bytes `from..to` of the content stream, in order.
    fn pieces(
        &self,
        snapshot: SnapshotId,
        content: &Content,
        from: u64,
        to: u64,
        mut each: impl FnMut(Piece),
    ) -> Result<(), String> {
        let mut hand_over = |pieces: &[Piece], from: u64| {
            let first = pieces.partition_point(|piece| piece.start + u64::from(piece.bytes) <= from);
            let held = pieces.get(first..).unwrap_or_default().iter().take_while(|piece| piece.start < to);
            held.filter(|piece| piece.bytes > 0).for_each(|piece| each(*piece));
            pieces.last().map_or(0, |last| last.start + u64::from(last.bytes))
        };
        match content {
            Content::Inline(_) => Ok(()),
            Content::Broken(reason) => Err(reason.to_string()),
            Content::Pieces(pieces) => {
                if hand_over(pieces, from) >= to {
                    Ok(())
                } else {
                    Err(too_short())
                }
            }
            Content::List(top) => {
                let mut at = from;
                while at < to {
                    let part = self.part(snapshot, *top, at)?;
                    hand_over(&part.items, at);
                    at = part.end;
                }
                Ok(())
            }
        }
    }

    fn part(&self, snapshot: SnapshotId, top: ChunkId, at: u64) -> Result<Arc<Part<Piece>>, String> {
        if let Some(part) = self.lists.get(top, at) {
            return Ok(part);
        }
        let found = self.readers.of(snapshot).leaf_at(top, ListKind::Content, at);
        let leaf = found.map_err(|part| why_not_read(&part.error))?.ok_or_else(too_short)?;
        let mut start = leaf.start;
        let placed = leaf.pieces().map_err(|error| error.to_string())?.into_iter().map(|(id, bytes)| {
            let piece = Piece { id, start, bytes };
            start = start.saturating_add(bytes.into());
            piece
        });
        let part = Part { start: leaf.start, end: leaf.end, items: placed.collect() };
        Ok(self.lists.insert(top, part))
    }
}

fn range(start: u64, bytes: u64) -> Option<std::ops::Range<usize>> {
    Some(usize::try_from(start).ok()?..usize::try_from(start.checked_add(bytes)?).ok()?)
}

fn fill(answer: &mut [u8], place: usize, source: &[u8]) -> Result<(), String> {
    let target = answer.get_mut(place..).and_then(|rest| rest.get_mut(..source.len())).ok_or_else(too_short)?;
    target.copy_from_slice(source);
    Ok(())
}

fn too_short() -> String {
    "the tree contradicts itself: the file's content is shorter than its size says".to_owned()
}
