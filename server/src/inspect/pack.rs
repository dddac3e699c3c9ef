//! Packs, the blocks in them, and the state files beside them.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use strandline_messages::format::block::BlockView;
use strandline_messages::format::block::{BLOCK_MAGIC, BLOCK_VERSION, BlockHeaderV1, FIXED_HEADER_BYTES};
use strandline_messages::format::pack::{
    END_MAGIC, FOOTER_MAGIC, FooterEntry, PACK_HEADER_BYTES, PACK_MAGIC, PACK_VERSION, PackHeaderV1, TRAILER_BYTES,
};
use strandline_messages::format::pack_state::{
    RecordedState, STATE_HEADER_BYTES, STATE_MAGIC, STATE_RECORD_BYTES, STATE_VERSION, StateHeaderV1,
};
use strandline_messages::limits;

use super::{Inspection, Walker};
use crate::storage::pack_file;

const KINDS: [&str; 2] = ["data", "tree"];

/// A pack: header, blocks (all read and compared with their digests), footer and trailer.
pub(super) fn pack(file: &File, path: &Path) -> anyhow::Result<Inspection> {
    let cannot = || format!("cannot read {}", path.display());
    let file_bytes = file.metadata().with_context(cannot)?.len();
    let head = read(file, 0, PACK_HEADER_BYTES as u64, file_bytes).with_context(cannot)?;
    let mut walker = Walker::new("pack", &head, 0);
    let header = pack_header(&mut walker).and_then(|()| PackHeaderV1::decode(&head).ok());
    let gone = header.as_ref().map(|header| recorded(path, header)).unwrap_or_default();
    let footer = pack_file::read_footer(file, path)?;
    let (blocks, footer_at) = match (footer, &header) {
        (Some((footer, at)), _) => (footer.blocks, Some(u64::from(at))),
        (None, Some(header)) => {
            walker.problem(
                file_bytes,
                "there is no footer that can be trusted: the pack was not finished, or its end is damaged; \
                 these are the intact blocks that a scan finds",
            );
            (pack_file::scan(file, path, header.repository)?, None)
        }
        (None, None) => (Vec::new(), None),
    };
    for (n, entry) in (1..).zip(&blocks) {
        let FooterEntry { offset, bytes, kind, chunks, digest } = entry;
        let state = gone.get(offset);
        let state_text = match state {
            Some(RecordedState::Freed) => ", freed",
            Some(RecordedState::Withdrawn) => ", withdrawn",
            None => "",
        };
        let kind = KINDS.get((*kind as usize).saturating_sub(1)).copied().unwrap_or_default();
        let value = format!("{kind}, {chunks} chunks, digest {digest}{state_text}");
        walker.note(u64::from(*offset), *bytes as usize, &format!("block {n}"), value);
        if state.is_none()
            && let Some(wrong) = wrong_with(file, file_bytes, entry).with_context(cannot)?
        {
            walker.problem(u64::from(*offset), wrong);
        }
    }
    let mut found = walker.finish();
    if let Some(at) = footer_at {
        let tail = read(file, at, file_bytes - at, file_bytes).with_context(cannot)?;
        let mut walker = Walker::new("pack", &tail, at);
        let _ = pack_tail(&mut walker, blocks.len());
        let tail = walker.finish();
        found.fields.extend(tail.fields);
        found.problems.extend(tail.problems);
    }
    Ok(found)
}

fn read(file: &File, at: u64, bytes: u64, file_bytes: u64) -> std::io::Result<Vec<u8>> {
    let there = bytes.min(file_bytes.saturating_sub(at));
    let mut buffer = vec![0; usize::try_from(there).unwrap_or_default()];
    file.read_exact_at(&mut buffer, at)?;
    Ok(buffer)
}

fn pack_header(walker: &mut Walker<'_>) -> Option<()> {
    walker.magic(PACK_MAGIC)?;
    walker.version(PACK_VERSION)?;
    walker.zeros(6)?;
    walker.hex("repository id", 16)?;
    walker.hex("writer domain", 16)?;
    walker.u32("number")?;
    walker.zeros(4)?;
    walker.time("created")?;
    walker.digest("digest", 0)
}

fn pack_tail(walker: &mut Walker<'_>, blocks: usize) -> Option<()> {
    walker.magic(FOOTER_MAGIC)?;
    walker.u32("number of blocks")?;
    let entries = walker.bytes.len().saturating_sub(walker.at + TRAILER_BYTES);
    walker.take("entries", entries, |_| format!("the {blocks} blocks above, 43 bytes each"))?;
    let end = walker.at;
    walker.u32("footer length")?;
    let covered = blake3::hash(walker.bytes.get(..end).unwrap_or_default());
    let offset = walker.offset();
    if walker.hex("digest of the footer", 32)? != covered.as_bytes() {
        walker.problem(offset, "the digest does not match the footer");
    }
    walker.magic(END_MAGIC)
}

/// What a block on disk is not as it should be; nothing if it is intact.
fn wrong_with(file: &File, file_bytes: u64, entry: &FooterEntry) -> std::io::Result<Option<String>> {
    if entry.bytes as usize > limits::BLOCK_BYTES_MAX {
        return Ok(Some("the footer gives this block an impossible length".to_owned()));
    }
    let bytes = read(file, entry.offset.into(), entry.bytes.into(), file_bytes)?;
    Ok(match BlockView::parse(&bytes).and_then(|view| view.verify_digest()) {
        Ok(digest) if digest == entry.digest => None,
        Ok(_) => Some("this is another block than the footer lists".to_owned()),
        Err(error) => Some(error.to_string()),
    })
}

/// What the state file beside a pack says of its blocks, if there is one.
fn recorded(path: &Path, header: &PackHeaderV1) -> HashMap<u32, RecordedState> {
    let Ok(bytes) = std::fs::read(path.with_extension("state")) else { return HashMap::new() };
    let Some((head, records)) = bytes.split_at_checked(STATE_HEADER_BYTES) else { return HashMap::new() };
    match StateHeaderV1::decode(head) {
        Ok(state) if state.number == header.number && state.repository == header.repository => {
            state.decode_records(records).map(|record| (record.offset, record.state)).collect()
        }
        _ => HashMap::new(),
    }
}

/// The block at `offset`: header and chunk table; with `trees`, what each tree refers to.
pub(super) fn block(file: &File, path: &Path, offset: u64, trees: bool) -> anyhow::Result<Inspection> {
    let cannot = || format!("cannot read {}", path.display());
    let file_bytes = file.metadata().with_context(cannot)?.len();
    let fixed = read(file, offset, FIXED_HEADER_BYTES as u64, file_bytes).with_context(cannot)?;
    // What the header says about the length counts only if it is within the limits.
    let whole = match BlockHeaderV1::decode(&fixed) {
        Ok(header) => read(file, offset, header.block_bytes() as u64, file_bytes).with_context(cannot)?,
        Err(_) => fixed,
    };
    let mut walker = Walker::new(if trees { "tree" } else { "block" }, &whole, offset);
    let _ = block_fields(&mut walker, trees);
    Ok(walker.finish())
}

fn block_fields(walker: &mut Walker<'_>, trees: bool) -> Option<()> {
    walker.magic(BLOCK_MAGIC)?;
    walker.version(BLOCK_VERSION)?;
    let at = walker.offset();
    let kind = walker.choice("kind", 1, &KINDS)?;
    if trees && kind != 2 {
        walker.problem(at, "this is no block of trees: inspect it as a block");
    }
    walker.choice("codec", 0, &["stored", "zstd"])?;
    walker.choice("wrap algorithm", 1, &["X25519 HPKE"])?;
    walker.zeros(1)?;
    let wrapped = walker.u16("length of wrapped data key")?;
    let chunks = walker.u32("number of chunks")?;
    let table = walker.u32("length of chunk table")?;
    let body = walker.u32("length of body")?;
    walker.hex("repository id", 16)?;
    walker.hex("salt", 32)?;
    walker.hex("key commitment", 32)?;
    let fixed: &[u8] = walker.bytes.get(..FIXED_HEADER_BYTES).unwrap_or_default();
    if let Err(error) = BlockHeaderV1::decode(fixed) {
        walker.problem(walker.base, format!("the header is impossible ({error}): nothing behind it can be told apart"));
        return None;
    }
    walker.sealed("wrapped data key", wrapped.into())?;
    let table_end = walker.at + table as usize;
    for n in 1..=chunks {
        row(walker, n, kind == 2, trees)?;
    }
    if walker.at != table_end {
        let wrong = format!("the chunk table ends here, and not at {}", walker.base + table_end as u64);
        walker.problem(walker.offset(), wrong);
        return None;
    }
    walker.sealed("body", body as usize)?;
    walker.digest("digest", 0)
}

fn row(walker: &mut Walker<'_>, n: u32, tree: bool, show_references: bool) -> Option<()> {
    walker.hex(&format!("chunk {n}"), 32)?;
    if !tree {
        return Some(());
    }
    let count = walker.u16(&format!("references of chunk {n}"))?;
    if !show_references {
        walker
            .take("references", usize::from(count) * 33, |_| "33 bytes each; `inspect tree` shows them".to_owned())?;
        return Some(());
    }
    for position in 0..count {
        let at = walker.offset();
        let reference = walker.take(&format!("reference {position}"), 33, |bytes| match bytes.split_first() {
            Some((kind, id)) => {
                let kind = KINDS.get(usize::from(*kind).wrapping_sub(1)).copied().unwrap_or("unknown kind");
                format!("{kind} {}", data_encoding::HEXLOWER.encode(id))
            }
            None => String::new(),
        })?;
        if !matches!(reference.first(), Some(1 | 2)) {
            walker.problem(at, "the kind of this reference is not known");
        }
    }
    Some(())
}

/// A pack's state file.
pub(super) fn state(bytes: &[u8], base: u64) -> Inspection {
    let mut walker = Walker::new("state", bytes, base);
    let _ = state_fields(&mut walker);
    walker.finish()
}

fn state_fields(walker: &mut Walker<'_>) -> Option<()> {
    walker.magic(STATE_MAGIC)?;
    walker.version(STATE_VERSION)?;
    walker.zeros(2)?;
    walker.u32("pack number")?;
    walker.hex("repository id", 16)?;
    let header = StateHeaderV1::decode(walker.bytes.get(..STATE_HEADER_BYTES)?).ok()?;
    for n in 1.. {
        let rest = walker.bytes.get(walker.at..).unwrap_or_default();
        if rest.is_empty() {
            break;
        }
        let at = walker.offset();
        let record = rest.get(..STATE_RECORD_BYTES).and_then(|bytes| header.decode_records(bytes).next());
        let name = format!("record {n}");
        if let Some(record) = record {
            let state = if record.state == RecordedState::Freed { "freed" } else { "withdrawn" };
            let value = format!("block at {} {state}, {} ns", record.offset, record.at_ns);
            walker.take(&name, STATE_RECORD_BYTES, |_| value)?;
        } else {
            walker.take(&name, rest.len().min(STATE_RECORD_BYTES), |_| "does not count".to_owned())?;
            walker.problem(at, "the check of this record is wrong: a crash left part of it, or it is damaged");
        }
    }
    Some(())
}
