//! Damaged bytes never end the process, and what is intact is shown whole.

use proptest::prelude::*;
use strandline_messages::format::pack_state::StateRecordV1;
use strandline_messages::format::pack_state::{RecordedState, StateHeaderV1};

use super::*;
use crate::engine::fixture::{REPOSITORY, Writer, data_block, id, repository_file, tree_block};

fn file_of(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn inspected(kind: Kind, bytes: &[u8], offset: u64) -> Inspection {
    let (_dir, path) = file_of(bytes);
    inspect(kind, &path, offset).unwrap()
}

fn state_file() -> Vec<u8> {
    let header = StateHeaderV1 { number: 7, repository: REPOSITORY };
    let record = StateRecordV1 { offset: 96, state: RecordedState::Freed, at_ns: 5 };
    [header.encode(), header.encode_record(&record)].concat()
}

fn samples() -> Vec<(Kind, Vec<u8>)> {
    vec![
        (Kind::Block, data_block(REPOSITORY, &[id(1), id(2)])),
        (Kind::Tree, tree_block(&[(id(9), &[id(1)], &[id(2)])])),
        (Kind::Manifest, Writer::full().manifest(id(1), "job").to_vec()),
        (Kind::Repository, repository_file("main").encode()),
        (Kind::State, state_file()),
    ]
}

fn value<'a>(found: &'a Inspection, name: &str) -> &'a str {
    &found.fields.iter().find(|field| field.name == name).unwrap().value
}

#[test]
fn whole_files_are_shown_without_gaps_and_without_complaint() {
    for (kind, bytes) in samples() {
        let found = inspected(kind, &bytes, 0);
        assert_eq!(found.problems, [], "{kind:?}");
        let fields = found.fields.iter().filter(|field| field.name != "snapshot id");
        let end = fields.fold(0, |at, field| {
            assert_eq!(field.offset, at, "{kind:?} {}", field.name);
            at + field.bytes
        });
        assert_eq!(end, bytes.len() as u64, "{kind:?}");
    }
}

#[test]
fn a_block_inside_a_file_is_shown_with_offsets_of_the_file() {
    let block = tree_block(&[(id(9), &[id(1)], &[id(2)])]);
    let (_dir, path) = file_of(&[vec![0; 50], block].concat());
    let (path, offset) = split_offset(&format!("{}@50", path.display()));
    let found = inspect(Kind::Tree, &path, offset).unwrap();
    assert_eq!(found.problems, []);
    assert_eq!(found.fields[0].offset, 50);
    assert_eq!(value(&found, "chunk 1"), id(9).to_string());
    assert_eq!(value(&found, "reference 0"), format!("data {}", id(1)));
    assert_eq!(value(&found, "reference 1"), format!("tree {}", id(2)));
    assert_eq!(split_offset("/nowhere@0x10"), (PathBuf::from("/nowhere"), 16));
    assert_eq!(split_offset("/nowhere@x"), (PathBuf::from("/nowhere@x"), 0));
}

#[test]
fn s52_every_flipped_byte_is_told() {
    for (kind, bytes) in samples() {
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(!inspected(kind, &bad, 0).problems.is_empty(), "{kind:?} byte {at}");
        }
    }
}

#[test]
fn a_file_that_ends_early_is_told_with_the_place() {
    for (kind, bytes) in samples() {
        for cut in 0..bytes.len() {
            let found = inspected(kind, &bytes[..cut], 0);
            // A state file may end after any record.
            if kind == Kind::State && cut == 32 {
                continue;
            }
            assert!(found.problems.iter().all(|problem| problem.offset <= cut as u64), "{kind:?} {cut}");
            assert!(!found.problems.is_empty(), "{kind:?} {cut}");
        }
    }
}

proptest! {
    #[test]
    fn s43_no_bytes_end_the_process(mut bytes: Vec<u8>, which in 0usize..5, flips: Vec<(usize, u8)>) {
        for (kind, mut sample) in samples().into_iter().skip(which).take(1) {
            for &(at, mask) in &flips {
                let length = sample.len();
                sample[at % length] ^= mask;
            }
            inspected(kind, &sample, 0);
            sample.append(&mut bytes);
            for kind in [Kind::Pack, Kind::Receipt, Kind::Slot, kind] {
                inspected(kind, &sample, 0);
            }
        }
    }
}
