//! What the programs find on their own disks, which others, or a failing disk, may have written: packs and their state, the
//! file cache, journals, the chunk index.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use strandline_agent::cache::{CacheIdentity, CacheReader};
use strandline_agent::scan::meta::Meta;
use strandline_messages::format::pack::{PACK_HEADER_BYTES, PackFooterV1, PackHeaderV1, TRAILER_BYTES, decode_trailer};
use strandline_messages::format::pack_state::{STATE_HEADER_BYTES, StateHeaderV1};
use strandline_messages::{ChunkId, limits};
use strandline_server::index::cache::PageCache;
use strandline_server::index::manifest::IndexManifest;
use strandline_server::index::segment::{self, PAGE_BYTES, PAGE_ENTRIES, Segment};
use strandline_server::inspect::{Kind, inspect};
use strandline_server::storage::journal::Journal;
use strandline_server::storage::pack_file;
use strandline_server::tenancy::journal::Event;

use super::formats::{decoded_memory, with_digest};
use super::memory::within;
use super::scratch;

/// What the readers of files take for their buffers: at most a few MiB, for bytes of any number.
const BUFFERS_BYTES: usize = 8 << 20;

/// First byte: what the file is taken for. Then a pack, or a state file, a receipt, a slot and so on, for `inspect`.
///
/// Headers and footers are encoded to bytes that are decoded to the same; nothing that a scan finds lies outside of the file.
pub fn pack(data: &[u8]) {
    let Some((&form, bytes)) = data.split_first() else { return };
    header(bytes);
    footer(bytes);
    state(bytes);
    let bytes = if form & 0x80 == 0 { bytes.to_vec() } else { with_trailer(bytes) };
    let path = scratch::file("00000001.pack", &bytes);
    within(BUFFERS_BYTES + decoded_memory(bytes.len()), || {
        let Ok(file) = File::open(&path) else { return };
        if let Ok(header) = pack_file::read_header(&file, &path) {
            let contents = pack_file::contents(&file, &path, header.number, header.domain, header.repository);
            if let Ok(contents) = contents
                && !contents.info.sealed
            {
                let end = |block: &strandline_messages::format::pack::FooterEntry| block.offset + block.bytes;
                assert!(contents.blocks.iter().all(|block| u64::from(end(block)) <= bytes.len() as u64));
            }
        }
        let kinds = [
            Kind::Pack,
            Kind::Block,
            Kind::Tree,
            Kind::Manifest,
            Kind::Receipt,
            Kind::Slot,
            Kind::Repository,
            Kind::State,
        ];
        let kind = kinds.get(usize::from(form & 0x7f) % kinds.len()).copied().unwrap_or(Kind::Pack);
        if let Ok(found) = inspect(kind, &path, 0) {
            assert!(
                found
                    .fields
                    .iter()
                    .all(|field| field.offset + field.bytes <= bytes.len().max(u32::MAX as usize) as u64)
            );
        }
    });
}

fn header(bytes: &[u8]) {
    let head = bytes.get(..PACK_HEADER_BYTES).unwrap_or(bytes);
    for head in [head, &with_digest(head)] {
        if let Ok(header) = within(decoded_memory(head.len()), || PackHeaderV1::decode(head)) {
            assert_eq!(PackHeaderV1::decode(&header.encode()), Ok(header));
        }
    }
}

fn footer(bytes: &[u8]) {
    let digest = *blake3::hash(bytes).as_bytes();
    if let Ok(footer) = within(decoded_memory(bytes.len()), || PackFooterV1::decode(bytes, &digest)) {
        let again = footer.encode();
        let (body, trailer) = again.split_at(again.len() - TRAILER_BYTES);
        assert_eq!(body, bytes);
        assert_eq!(decode_trailer(trailer).map(|(length, digest)| (length as usize, digest)), Ok((body.len(), digest)));
        assert!(footer.blocks.len() <= limits::PACK_BLOCKS_MAX);
    }
}

fn state(bytes: &[u8]) {
    let Some((head, records)) = bytes.split_at_checked(STATE_HEADER_BYTES) else { return };
    let Ok(header) = StateHeaderV1::decode(head) else { return };
    assert_eq!(StateHeaderV1::decode(&header.encode()), Ok(header));
    for record in header.decode_records(records) {
        let again = header.encode_record(&record);
        assert_eq!(header.decode_records(&again).collect::<Vec<_>>(), [record]);
    }
}

/// A pack's end made right: what stands before the trailer is taken for the footer from its magic on.
fn with_trailer(bytes: &[u8]) -> Vec<u8> {
    let body = bytes.get(..bytes.len().saturating_sub(TRAILER_BYTES)).unwrap_or_default();
    let magic = strandline_messages::format::pack::FOOTER_MAGIC;
    let at = body.windows(magic.len()).rposition(|window| window == magic).unwrap_or(body.len());
    let footer = body.get(at..).unwrap_or_default();
    let length = u32::try_from(footer.len()).unwrap_or(u32::MAX).to_le_bytes();
    [body, &length, blake3::hash(footer).as_bytes(), &strandline_messages::format::pack::END_MAGIC].concat()
}

/// First byte: how many steps of a walk follow, each a byte (what to do, and the length of a name) and that name. Then a file
/// cache, its digest made right.
///
/// A record that is given for a file is one of a file that looks the same.
pub fn file_cache(data: &[u8]) {
    let Some((&steps, mut rest)) = data.split_first() else { return };
    let mut walk = Vec::new();
    for _ in 0..steps % 16 {
        let Some((&step, after)) = rest.split_first() else { break };
        let (name, after) = after.split_at(usize::from(step >> 2).min(after.len()));
        walk.push((step & 3, name));
        rest = after;
    }
    let path = scratch::file("file.cache", &with_digest(rest));
    within(BUFFERS_BYTES + decoded_memory(data.len()), || {
        let Some(mut cache) = CacheReader::open(&path, CacheIdentity([7; 32])) else { return };
        let meta = Meta::default();
        for (step, name) in &walk {
            let record = match step {
                0 | 1 => cache.lookup(name, &meta),
                2 => cache.enter(name, &meta),
                _ => {
                    cache.leave();
                    None
                }
            };
            assert!(record.is_none_or(|record| record.identity == strandline_agent::cache::Identity::of(&meta)));
        }
    });
}

/// A journal of identities, every line's sum made right if the line has the length of one.
///
/// An event that is appended to whatever was there counts, after what counted before, and is no damage.
pub fn journal(data: &[u8]) {
    let mut lines = Vec::new();
    for line in data.split_inclusive(|&byte| byte == b'\n') {
        match line.strip_prefix(b"#") {
            // A line that begins like this is an event whose sum is right.
            Some(json) => {
                let json = json.strip_suffix(b"\n").unwrap_or(json);
                lines.extend_from_slice(blake3::hash(json).to_hex().as_bytes());
                lines.extend_from_slice(&[b" ", json, b"\n"].concat());
            }
            None => lines.extend_from_slice(line),
        }
    }
    let path = scratch::file("identities.journal", &lines);
    within(BUFFERS_BYTES + decoded_memory(lines.len()), || {
        let Ok(mut journal) = Journal::<Event>::open(&path) else { return };
        let Ok(before) = journal.replay() else { return };
        let Ok(tenant) = "acme".parse() else { return };
        let event = Event::TenantAdded { tenant, at_ns: 1 };
        assert!(journal.append(&event).is_ok());
        let Ok(after) = journal.replay() else { panic!("a journal can be read only once") };
        assert_eq!(after.events.split_last(), Some((&event, before.events.as_slice())));
        assert_eq!(after.damaged, before.damaged);
    });
}

/// First byte: whether the rest is the list of segments or a segment, its digests made right.
///
/// The list is written and read as the same. Every entry that a segment gives is found in it.
pub fn index(data: &[u8]) {
    let Some((&form, bytes)) = data.split_first() else { return };
    scratch::with(|directory| {
        if form % 2 == 0 {
            list_of_segments(directory, bytes);
        } else {
            one_segment(directory, bytes);
        }
    });
}

fn list_of_segments(directory: &Path, bytes: &[u8]) {
    scratch::file("MANIFEST", &with_digest(bytes));
    let read = within(BUFFERS_BYTES + decoded_memory(bytes.len()), || IndexManifest::load(directory));
    if let Ok(Some(manifest)) = read {
        assert!(manifest.store(directory).is_ok());
        assert!(IndexManifest::load(directory).is_ok_and(|again| again == Some(manifest)));
    }
}

fn one_segment(directory: &Path, bytes: &[u8]) {
    scratch::file("0000000000000001.segment", &with_segment_digests(bytes));
    within(BUFFERS_BYTES + decoded_memory(bytes.len()), || {
        let Ok(segment) = Segment::open(directory, 1, Arc::new(PageCache::new(1 << 16))) else { return };
        let mut ids: Vec<ChunkId> = segment.scan().map_while(Result::ok).map(|entry| entry.id).take(256).collect();
        ids.push(ChunkId([0x55; 32]));
        for id in &ids {
            // What a segment with unsorted pages or a wrong filter does not find is asked for and stored again.
            let _ = segment.finder().find(id, |entry| assert_eq!(entry.id, *id));
        }
    });
    let _ = std::fs::remove_file(segment::path(directory, 1));
}

/// A segment whose pages, tables and trailer have right digests, as far as its lengths let one tell them apart.
fn with_segment_digests(bytes: &[u8]) -> Vec<u8> {
    const TRAILER: usize = 96;
    let mut segment = bytes.to_vec();
    let Some(at) = segment.len().checked_sub(TRAILER) else { return segment };
    let entries = bytes.get(at + 16..at + 24).and_then(|field| field.try_into().ok()).map_or(0, u64::from_le_bytes);
    let pages = usize::try_from(entries.div_ceil(PAGE_ENTRIES as u64)).unwrap_or(usize::MAX);
    let tables = pages.saturating_mul(PAGE_BYTES).min(at);
    for page in segment.chunks_exact_mut(PAGE_BYTES).take(pages) {
        if let Some((body, check)) = page.split_last_chunk_mut::<16>() {
            check.fill(0);
            let whole = [&*body, &check[..]].concat();
            check.copy_from_slice(blake3::hash(&whole).as_bytes().first_chunk::<16>().unwrap_or(&[0; 16]));
        }
    }
    let digest = blake3::hash(segment.get(tables..at).unwrap_or_default());
    if let Some(field) = segment.get_mut(at + 32..at + 64) {
        field.copy_from_slice(digest.as_bytes());
    }
    let own = blake3::hash(segment.get(at..at + 64).unwrap_or_default());
    if let Some(field) = segment.get_mut(at + 64..) {
        field.copy_from_slice(own.as_bytes());
    }
    segment
}
