use std::sync::Arc;

use strandline_messages::ChunkId;
use strandline_messages::format::tree::EntryNode;

use super::*;
use crate::trees::memory::{DirMaker, MemoryRepository};
use crate::trees::{Resolved, TreeError, WalkError};

type Told = Vec<(Change, String)>;

fn compared(source: &Arc<dyn ChunkSource>, before: ChunkId, after: ChunkId) -> (Told, Changes) {
    let reader = TreeReader::new(Arc::clone(source), 1 << 20);
    let mut told = Vec::new();
    let (before, after) = (Resolved::Root(before), Resolved::Root(after));
    let changes = compare((&reader, Some(&before)), (&reader, Some(&after)), b"", |found| {
        let changed = found.map_err(|error| error.to_string())?;
        told.push((changed.change, String::from_utf8_lossy(changed.path).into_owned()));
        Ok::<_, String>(())
    });
    (told, changes.unwrap())
}

#[test]
fn each_kind_of_change_is_told_in_the_order_of_names() {
    let mut repo = MemoryRepository::new();
    let sub = |repo: &mut MemoryRepository, content: &[u8]| {
        let mut dir = DirMaker::default();
        dir.inline(b"x", content);
        dir.finish(repo)
    };
    let (old, new) = (sub(&mut repo, b"old"), sub(&mut repo, b"newer"));
    let mut before = DirMaker::default();
    before.inline(b"changed-mode", b"same");
    before.directory(b"dir", old);
    before.inline(b"gone", b"12345");
    before.directory(b"gone-dir", old);
    before.symlink(b"link", b"here");
    before.directory(b"was-dir", old);
    let before = before.finish(&mut repo);
    let mut after = DirMaker::default();
    after.inline(b"a-new", b"123");
    after.inline(b"changed-mode", b"same").mode = 0o600;
    after.directory(b"dir", new);
    after.symlink(b"link", b"there");
    after.inline(b"was-dir", b"now a file");
    let after = after.finish(&mut repo);
    let source: Arc<dyn ChunkSource> = repo.finish();
    let (told, changes) = compared(&source, before, after);
    let expected = [
        (Change::Added, "a-new"),
        (Change::Metadata, "changed-mode"),
        (Change::Modified, "dir/x"),
        (Change::Removed, "gone"),
        (Change::Removed, "gone-dir"),
        (Change::Removed, "gone-dir/x"),
        (Change::Modified, "link"),
        (Change::Type, "was-dir"),
        (Change::Removed, "was-dir/x"),
    ];
    assert_eq!(told, expected.map(|(change, path)| (change, path.to_owned())));
    assert_eq!(changes.files, Counts { added: 2, removed: 3, changed: 1 });
    assert_eq!(changes.directories, Counts { added: 0, removed: 2, changed: 0 });
    assert_eq!(changes.others, Counts { added: 0, removed: 0, changed: 1 });
    assert_eq!((changes.metadata, changes.problems), (1, 0));
    assert_eq!((changes.bytes_added, changes.bytes_removed), (3 + 2 + 10, 5 + 3 + 3));
}

#[test]
fn what_is_the_same_in_both_is_not_read_and_what_cannot_be_read_is_told() {
    let mut repo = MemoryRepository::new();
    let (missing, other) = (ChunkId([9; 32]), ChunkId([8; 32]));
    let root = |repo: &mut MemoryRepository, bad: ChunkId, name: &[u8]| {
        let mut dir = DirMaker::default();
        dir.directory(b"same", missing);
        dir.directory(b"unreadable", bad);
        dir.inline(name, b"");
        dir.finish(repo)
    };
    let (a, b, c) = (root(&mut repo, missing, b"x"), root(&mut repo, missing, b"y"), root(&mut repo, other, b"x"));
    let source: Arc<dyn ChunkSource> = repo.finish();
    let (told, changes) = compared(&source, a, b);
    assert_eq!((told.len(), changes.problems), (2, 0));
    let reader = TreeReader::new(Arc::clone(&source), 1 << 20);
    let mut problems = Vec::new();
    let changes = compare((&reader, Some(&Resolved::Root(a))), (&reader, Some(&Resolved::Root(c))), b"", |found| {
        problems.push(found.unwrap_err().to_string());
        Ok::<_, ()>(())
    });
    assert_eq!((problems.len(), changes.unwrap().problems), (1, 1));
    assert!(problems[0].starts_with("unreadable: "), "{problems:?}");
}

#[test]
fn changed_content_is_counted_chunk_by_chunk() {
    let mut repo = MemoryRepository::new();
    let mut dir = DirMaker::default();
    dir.file(&mut repo, b"a", b"aabbccdd", 2);
    dir.file(&mut repo, b"b", b"bbccxxbb", 2);
    dir.inline(b"c", b"123");
    let root = dir.finish(&mut repo);
    let reader = TreeReader::new(repo.finish(), 1 << 20);
    let file = |name: &[u8]| reader.find(root, name).unwrap().unwrap();
    let change = |a: &[u8], b: &[u8]| {
        let scratch = tempfile::tempdir().unwrap();
        content_change((&reader, &file(a)), (&reader, &file(b)), scratch.path().to_owned()).unwrap()
    };
    assert_eq!(change(b"a", b"b"), ContentChange { added: 4, removed: 4 });
    assert_eq!(change(b"a", b"a"), ContentChange::default());
    assert_eq!(change(b"c", b"a"), ContentChange { added: 8, removed: 3 });
}

fn search(search: &mut Search, source: &Arc<dyn ChunkSource>, root: ChunkId) -> (Vec<String>, usize) {
    let (mut paths, mut problems) = (Vec::new(), 0);
    let searched = search.snapshot(Arc::clone(source), root, |found: Result<Found<'_>, WalkError>| {
        match found {
            Ok(found) => paths.push(String::from_utf8_lossy(found.path).into_owned()),
            Err(_) => problems += 1,
        }
        Ok::<_, ()>(())
    });
    searched.unwrap();
    (paths, problems)
}

#[test]
fn directories_without_a_match_are_not_read_again_unless_their_path_matters() {
    let mut repo = MemoryRepository::new();
    let mut deep = DirMaker::default();
    deep.inline(b"nothing", b"");
    let deep = deep.finish(&mut repo);
    let root = |repo: &mut MemoryRepository, name: &[u8]| {
        let mut dir = DirMaker::default();
        dir.inline(b"needle", b"");
        dir.directory(name, deep);
        dir.finish(repo)
    };
    let (first, second) = (root(&mut repo, b"a"), root(&mut repo, b"b"));
    let source: Arc<dyn ChunkSource> = repo.finish();
    let query =
        |pattern: &str| Query { pattern: Some(Pattern::new(&[pattern.into()], false).unwrap()), ..Query::default() };
    let mut by_name = Search::new(query("needle"));
    assert_eq!(search(&mut by_name, &source, first), (vec!["needle".to_owned()], 0));
    let fetched = |search: &mut Search, root| {
        let empty: Arc<dyn ChunkSource> = MemoryRepository::new().finish();
        // The cache is emptied: only what is remembered is left.
        search.look = Look::new();
        self::search(search, &empty, root).1
    };
    assert_eq!(fetched(&mut by_name, first), 1, "a root with a match is read again");
    let mut nothing = Search::new(query("haystack"));
    assert_eq!(search(&mut nothing, &source, first), (vec![], 0));
    assert_eq!(fetched(&mut nothing, first), 0, "one without is not");
    let mut by_path = Search::new(query("/b/nothing"));
    assert_eq!(search(&mut by_path, &source, first), (vec![], 0));
    assert_eq!(search(&mut by_path, &source, second), (vec!["b/nothing".to_owned()], 0));
}

#[test]
fn everything_that_is_asked_for_must_hold() {
    let mut repo = MemoryRepository::new();
    let mut dir = DirMaker::default();
    dir.file(&mut repo, b"big", &[7; 3000], 1000);
    dir.inline(b"small", b"1");
    dir.inline(b"late", b"12").mtime.seconds = 1_700_000_000;
    dir.symlink(b"link", b"x");
    let root = dir.finish(&mut repo);
    let chunk = repo.keyset.chunk_id(strandline_messages::ChunkKind::Data, &[7; 1000], &[]);
    let source: Arc<dyn ChunkSource> = repo.finish();
    let found = |query| search(&mut Search::new(query), &source, root).0;
    let base = Query::default;
    assert_eq!(found(base()), ["big", "late", "link", "small"]);
    assert_eq!(found(Query { size: Some(SizeTest::More(1)), ..base() }), ["big", "late"]);
    assert_eq!(found(Query { size: Some(SizeTest::Less(2)), ..base() }), ["small"]);
    assert_eq!(found(Query { size: Some(SizeTest::Exactly(2)), ..base() }), ["late"]);
    assert_eq!(found(Query { types: vec![EntryType::Symlink], ..base() }), ["link"]);
    let moment = Some(1_650_000_000_000_000_000);
    assert_eq!(found(Query { newer_ns: moment, ..base() }), ["late"]);
    assert_eq!(found(Query { older_ns: moment, types: vec![EntryType::File], ..base() }), ["big", "small"]);
    let prefix = Prefix::parse(&chunk.to_string()[..9]);
    assert_eq!(found(Query { chunk: prefix.clone(), ..base() }), ["big"]);
    assert!(found(Query { chunk: prefix, size: Some(SizeTest::Less(5)), ..base() }).is_empty());
}

#[test]
fn totals_count_links_files_and_chunks_once() {
    let mut repo = MemoryRepository::new();
    let mut below = DirMaker::default();
    below.file(&mut repo, b"copy", &[1; 500], 100);
    let linked = |dir: &mut DirMaker, repo: &mut MemoryRepository, name: &[u8]| {
        let entry = dir.file(repo, name, &[2; 300], 100);
        (entry.inode, entry.links) = (77, 2);
    };
    linked(&mut below, &mut repo, b"link");
    let below = below.finish(&mut repo);
    let mut root = DirMaker::default();
    root.directory(b"d", below);
    root.file(&mut repo, b"file", &[1; 500], 100);
    linked(&mut root, &mut repo, b"link");
    root.add(b"pipe", EntryNode::Fifo);
    let root = root.finish(&mut repo);
    let source: Arc<dyn ChunkSource> = repo.finish();
    let scratch = tempfile::tempdir().unwrap();
    let directory = || scratch.path().to_owned();
    let fail = |error: WalkError| panic!("{error}");

    let mut size = RestoreSize::new(directory());
    let expected = FileTotals { files: 4, directories: 1, others: 1, bytes: 500 + 500 + 300 };
    for _ in 0..2 {
        assert_eq!(size.snapshot(Arc::clone(&source), root, fail).unwrap(), expected);
    }
    let mut files = UniqueFiles::new(directory());
    let mut chunks = UniqueChunks::new(directory());
    for _ in 0..2 {
        files.snapshot(Arc::clone(&source), root, fail).unwrap();
        chunks.tree(Arc::clone(&source), root, |error: TreeError| panic!("{error}")).unwrap();
    }
    assert_eq!(files.finish().unwrap(), FileTotals { files: 2, bytes: 800, ..FileTotals::default() });
    let totals = chunks.finish().unwrap();
    assert_eq!((totals.data_chunks, totals.data_bytes, totals.tree_chunks), (2, 200, 2));
}
