use std::sync::atomic::Ordering;

use strandline_messages::ChunkKind;
use strandline_messages::format::chunk::Reference;
use strandline_messages::format::tree::{EntryNode, Hole, Piece};

use super::*;
use crate::trees::memory::{DirMaker, MemoryRepository, MemorySource};

/// A root with a directory `d` of a few files, and their contents.
struct Fixture {
    source: Arc<MemorySource>,
    root: ChunkId,
    first: Vec<u8>,
    second: Vec<u8>,
    scratch: tempfile::TempDir,
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

impl Fixture {
    fn new() -> Self {
        let mut repo = MemoryRepository::new();
        let (first, second) = (noise(1, 50_000), noise(2, 30_000));
        let mut below = DirMaker::default();
        below.file(&mut repo, b"first", &first, 5000);
        below.inline(b"inline", b"small");
        below.file(&mut repo, b"second", &second, 1000);
        below.add(b"socket", EntryNode::Socket);
        let top = below.finish(&mut repo);
        let mut root = DirMaker::default();
        root.directory(b"d", top);
        let root = root.finish(&mut repo);
        Self { source: repo.finish(), root, first, second, scratch: tempfile::tempdir().unwrap() }
    }

    fn options(&self, window_bytes: u64) -> ExportOptions {
        ExportOptions { window_bytes, ..ExportOptions::new(self.scratch.path().to_owned()) }
    }

    fn write(&self, path: &[u8], archive: Option<Archive>, window: u64) -> (Vec<u8>, Result<Exported, ExportError>) {
        let mut out = Vec::new();
        let source = Arc::clone(&self.source) as Arc<dyn ChunkSource>;
        let written = Export::find(source, self.root, path, archive)
            .and_then(|export| export.write(&mut out, &self.options(window)));
        (out, written)
    }
}

fn one_file(make: impl FnOnce(&mut MemoryRepository, &mut DirMaker)) -> (Vec<u8>, Exported) {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    make(&mut repo, &mut root);
    let root = root.finish(&mut repo);
    let scratch = tempfile::tempdir().unwrap();
    let mut out = Vec::new();
    let export = Export::find(repo.finish(), root, b"file", None).unwrap();
    let exported = export.write(&mut out, &ExportOptions::new(scratch.path().to_owned())).unwrap();
    (out, exported)
}

#[test]
fn a_file_comes_as_it_is_whatever_the_size_of_windows() {
    let fixture = Fixture::new();
    for window in [1, 7000, 1 << 20] {
        let (out, written) = fixture.write(b"/d//first", None, window);
        assert_eq!(written.unwrap().bytes, 50_000);
        assert!(out == fixture.first, "{window}");
    }
    assert_eq!(fixture.write(b"d/inline", None, 1).0, b"small");
    assert!(matches!(fixture.write(b"d/socket", None, 1), (_, Err(ExportError::NoContent { .. }))));
    assert!(matches!(fixture.write(b"d/none", None, 1), (_, Err(ExportError::Path(_)))));
}

#[test]
fn a_tar_archive_holds_everything_but_sockets_and_is_the_same_whatever_the_size_of_windows() {
    let fixture = Fixture::new();
    let (whole, written) = fixture.write(b"", None, 1 << 20);
    let written = written.unwrap();
    assert_eq!((written.entries, written.bytes, written.left_out), (4, 80_005, 1));
    assert_eq!(written.remarks[0].0, b"d/socket");
    let mut archive = ::tar::Archive::new(whole.as_slice());
    let mut found = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        io::Read::read_to_end(&mut entry, &mut content).unwrap();
        found.push((entry.path_bytes().into_owned(), content));
    }
    let expected: [(&[u8], &[u8]); 4] =
        [(b"d/", b""), (b"d/first", &fixture.first), (b"d/inline", b"small"), (b"d/second", &fixture.second)];
    assert!(found.iter().map(|(name, content)| (name.as_slice(), content.as_slice())).eq(expected));
    assert_eq!(whole.len() % 512, 0);
    assert!(fixture.write(b"", Some(Archive::Tar), 1).0 == whole);
}

#[test]
fn many_chunks_come_in_few_fetches() {
    let fixture = Fixture::new();
    fixture.write(b"d", None, 1 << 20).1.unwrap();
    let fetches = fixture.source.fetches.load(Ordering::SeqCst);
    assert!(fetches <= 4, "{fetches} fetches for 40 chunks and 2 directories");
}

#[test]
fn an_archive_that_cannot_be_read_to_its_end_does_not_look_complete() {
    for archive in [Archive::Tar, Archive::Zip] {
        let fixture = Fixture::new();
        let (whole, _) = fixture.write(b"", Some(archive), 1 << 20);
        // The fourth block of data holds pieces of `second`.
        let mut blocks = std::mem::take(&mut *fixture.source.blocks.lock());
        let place = blocks[3].len() - 40;
        blocks[3][place] ^= 1;
        *fixture.source.blocks.lock() = blocks;
        let (out, written) = fixture.write(b"", Some(archive), 1 << 20);
        let error = written.unwrap_err().to_string();
        assert!(error.contains("/d/second") && error.contains("block number 3"), "{error}");
        assert!(error.contains("not complete") && !error.contains("can be restored"), "{error}");
        assert!(out.len() < whole.len() && whole.starts_with(&out), "what was written before is right");
        let end = [0; 1024];
        assert!(!out.ends_with(&end) && !out.windows(4).any(|bytes| bytes == [0x50, 0x4b, 5, 6]));
    }
}

#[test]
fn a_directory_that_cannot_be_read_ends_an_archive_like_a_damaged_file() {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    root.inline(b"before", b"it");
    root.directory(b"missing", ChunkId([9; 32]));
    let root = root.finish(&mut repo);
    let source: Arc<dyn ChunkSource> = repo.finish();
    let scratch = tempfile::tempdir().unwrap();
    for archive in [Archive::Tar, Archive::Zip] {
        let mut out = Vec::new();
        let export = Export::find(Arc::clone(&source), root, b"", Some(archive)).unwrap();
        let error = export.write(&mut out, &ExportOptions::new(scratch.path().to_owned())).unwrap_err().to_string();
        assert!(error.starts_with("/missing: ") && error.contains("not complete"), "{error}");
        assert!(!out.is_empty() && !out.ends_with(&[0; 1024]));
        assert!(!out.windows(4).any(|bytes| bytes == [0x50, 0x4b, 5, 6]));
    }
}

#[test]
fn a_repository_that_goes_away_ends_the_export_with_the_reason() {
    let fixture = Fixture::new();
    fixture.source.lost_after.store(3, Ordering::SeqCst);
    let error = fixture.write(b"", None, 4000).1.unwrap_err().to_string();
    assert!(error.contains("cable pulled"), "{error}");
}

#[test]
fn a_reader_that_goes_away_is_a_closed_pipe() {
    struct Gone;
    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let fixture = Fixture::new();
    let source = Arc::clone(&fixture.source) as Arc<dyn ChunkSource>;
    let export = Export::find(source, fixture.root, b"", None).unwrap();
    let error = export.write(&mut Gone, &fixture.options(1)).unwrap_err();
    assert!(error.is_closed_pipe(), "{error}");
    let options = fixture.options(1);
    options.cancel.store(true, Ordering::Relaxed);
    assert!(matches!(export.write(&mut Vec::new(), &options), Err(ExportError::Cancelled)));
}

#[test]
fn one_chunk_may_be_needed_any_number_of_times() {
    let (out, _) = one_file(|repo, root| {
        let id = repo.chunk(ChunkKind::Data, b"again", &[]);
        let position = root.position(Reference::data(id));
        let pieces = vec![Piece { position, bytes: 5 }; 8000];
        let content = strandline_messages::format::tree::Content::Pieces(pieces);
        root.add(b"file", EntryNode::File { size: 40_000, content, holes: Vec::new() });
    });
    assert!(out == b"again".repeat(8000));
}

#[test]
fn a_file_that_holds_less_than_it_says_is_padded_and_one_that_holds_more_is_cut() {
    let sized = |size| {
        one_file(|_, root| {
            let content = strandline_messages::format::tree::Content::Inline(b"12345".to_vec());
            root.add(b"file", EntryNode::File { size, content, holes: Vec::new() });
        })
    };
    let (out, exported) = sized(7);
    assert_eq!((out.as_slice(), exported.flaws), (b"12345\0\0".as_slice(), 1));
    assert!(exported.remarks[0].1.contains("5 bytes"), "{:?}", exported.remarks);
    let (out, exported) = sized(3);
    assert_eq!((out.as_slice(), exported.flaws), (b"123".as_slice(), 1));
}

#[test]
fn holes_of_a_file_become_zeros() {
    let (out, exported) = one_file(|repo, root| {
        let entry = root.file(repo, b"file", b"abcdef", 2);
        if let EntryNode::File { size, holes, .. } = &mut entry.node {
            (*size, *holes) = (12, vec![Hole { offset: 1, bytes: 4 }, Hole { offset: 10, bytes: 2 }]);
        }
    });
    assert_eq!((out.as_slice(), exported.flaws), (b"a\0\0\0\0bcdef\0\0".as_slice(), 0));
}
