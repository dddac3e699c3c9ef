//! The bytes on disk that others may have written: blocks, tree nodes, manifests, receipts, repository files.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use strandline_messages::format::block::{BlockView, DIGEST_BYTES, encode_row};
use strandline_messages::format::manifest::{DetailsV1, ManifestV1};
use strandline_messages::format::receipt::ReceiptV1;
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::format::tree::{Entry, ListKind, NodeBody, TreeNodeV1};
use strandline_messages::limits;

use super::memory::within;

/// What a decoder may take of memory for so many bytes: the structures of the richest input are about 200 times as large
/// as the one byte that may stand for each, and lists grow by doubling.
pub(super) fn decoded_memory(bytes: usize) -> usize {
    640 * bytes + (64 << 10)
}

/// `bytes` with their last 32 replaced by the digest of those before.
pub(super) fn with_digest(bytes: &[u8]) -> Vec<u8> {
    let covered = bytes.get(..bytes.len().saturating_sub(DIGEST_BYTES)).unwrap_or_default();
    [covered, blake3::hash(covered).as_bytes()].concat()
}

/// A block, its digest as it is and made right. Its parts, put together again, are the same bytes, and so are its rows.
pub fn block(data: &[u8]) {
    for bytes in [data, &with_digest(data)] {
        within(decoded_memory(bytes.len()), || {
            let Ok(view) = BlockView::parse(bytes) else { return };
            let mut again = Vec::new();
            view.header.encode(&mut again);
            again.extend_from_slice(view.wrapped_key());
            assert_eq!(again.len() + view.table().len(), view.aad().len());
            let mut rows = 0;
            for row in view.rows() {
                let Ok(row) = row else { panic!("a row of a parsed block cannot be read") };
                encode_row(view.header.kind, &row.id, &row.references, &mut again);
                rows += 1;
            }
            assert_eq!(rows, view.header.chunks);
            again.extend_from_slice(view.body());
            again.extend_from_slice(view.stored_digest().as_bytes());
            assert_eq!(again, bytes);
            assert_eq!(view.verify_digest().is_ok(), bytes == with_digest(bytes));
        });
    }
}

/// First two bytes: how many references the chunk has. Then a tree node.
///
/// It is encoded to bytes that are decoded to the same; no name could leave its directory; no position is outside of the
/// references; holes and times are possible ones; order and levels are as the format says.
pub fn tree(data: &[u8]) {
    let Some((references, bytes)) = data.split_first_chunk() else { return };
    let references = usize::from(u16::from_le_bytes(*references)) % (limits::TREE_REFERENCES_MAX + 1);
    let decoded = within(decoded_memory(bytes.len()), || TreeNodeV1::decode(bytes, references));
    let Ok(node) = decoded else { return };
    let again = node.encode();
    assert!(again.len() <= bytes.len(), "the encoder writes the shortest form");
    assert_eq!(TreeNodeV1::decode(&again, references).as_ref(), Ok(&node));
    match &node.body {
        NodeBody::Directory { owners, entries } => {
            for entry in entries {
                check_entry(entry, owners.len());
            }
            assert!(entries.is_sorted_by(|a, b| a.name < b.name));
        }
        NodeBody::Index { level, children } => {
            assert!((1..=limits::LIST_DEPTH_MAX).contains(level));
            assert!(children.iter().all(|child| (child.position as usize) < references));
            if node.kind == ListKind::Directory {
                for child in children {
                    check_name(&child.first_name);
                }
            }
        }
        NodeBody::Content(pieces) => assert!(pieces.iter().all(|piece| (piece.position as usize) < references)),
        NodeBody::Errors(_) => {}
    }
}

fn check_entry(entry: &Entry, owners: usize) {
    check_name(&entry.name);
    assert!(entry.mode <= 0o7777 && (entry.owner as usize) < owners);
    assert!(entry.mtime.nanos < 1_000_000_000 && entry.ctime.nanos < 1_000_000_000);
}

/// What the system's own rules make of a name: one step down, and nothing else.
pub(super) fn check_name(name: &[u8]) {
    let path = Path::new(OsStr::from_bytes(name));
    let components: Vec<Component<'_>> = path.components().collect();
    assert_eq!(components, [Component::Normal(OsStr::from_bytes(name))], "{:?}", name.escape_ascii().to_string());
    assert!(!name.contains(&0) && name.len() <= limits::FILE_NAME_BYTES_MAX);
}

/// A manifest. It is encoded to bytes that are decoded to the same, and its parts are beginnings of one another.
pub fn manifest(data: &[u8]) {
    let decoded = within(decoded_memory(data.len()), || ManifestV1::decode(data));
    let Ok(manifest) = decoded else { return };
    let again = manifest.encode();
    assert!(again.len() <= data.len(), "the encoder writes the shortest form");
    assert_eq!(ManifestV1::decode(&again).as_ref(), Ok(&manifest));
    assert!(again.starts_with(&manifest.encode_signed_part()));
    assert!(manifest.encode_signed_part().starts_with(&manifest.encode_visible()));
}

/// The opened details of a manifest. They are encoded to bytes that are decoded to the same.
pub fn details(data: &[u8]) {
    let decoded = within(decoded_memory(data.len()), || DetailsV1::decode(data));
    if let Ok(details) = decoded {
        assert_eq!(DetailsV1::decode(&details.encode()), Ok(details));
    }
}

/// A receipt. Every field has a fixed width: it is encoded to the same bytes.
pub fn receipt(data: &[u8]) {
    let decoded = within(decoded_memory(data.len()), || ReceiptV1::decode(data));
    if let Ok(receipt) = decoded {
        assert_eq!(receipt.encode(), data);
    }
}

/// A repository file, its digest as it is and made right. It is encoded to bytes that are decoded to the same, and its
/// sizes are ones that the chunker can work with.
pub fn repository_file(data: &[u8]) {
    for bytes in [data, &with_digest(data)] {
        let decoded = within(decoded_memory(bytes.len()), || RepositoryV1::decode(bytes));
        let Ok(file) = decoded else { continue };
        assert_eq!(RepositoryV1::decode(&file.encode()).as_ref(), Ok(&file));
        let sizes = file.chunking;
        assert!(64 <= sizes.minimum && sizes.minimum <= sizes.average && sizes.average <= sizes.maximum);
        assert!(sizes.maximum as usize <= limits::CHUNK_BYTES_MAX);
    }
}
