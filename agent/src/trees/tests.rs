//! Trees made by hand are read back through sealed blocks.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use strandline_messages::format::chunk::Reference;
use strandline_messages::format::tree::{Content, EntryNode, ListKind, NodeBody, Piece, SourceError};
use strandline_messages::{ChunkId, ChunkKind};

use super::memory::{DirMaker, MemoryRepository, MemorySource};
use super::*;

fn reader(source: &Arc<MemorySource>) -> TreeReader {
    TreeReader::new(Arc::<MemorySource>::clone(source), 1 << 20)
}

/// root: a (file), d/ (x, sub/ (y)), huge/ (index over leaves of 3: n00 … n11)
fn sample() -> (Arc<MemorySource>, ChunkId) {
    let mut repo = MemoryRepository::new();
    let mut sub = DirMaker::default();
    sub.inline(b"y", b"why");
    let sub = sub.finish(&mut repo);
    let mut d = DirMaker::default();
    d.inline(b"x", b"ex");
    d.directory(b"sub", sub);
    let d = d.finish(&mut repo);
    let names: Vec<String> = (0..12).map(|i| format!("n{i:02}")).collect();
    let mut leaves = Vec::new();
    for part in names.chunks(3) {
        let mut leaf = DirMaker::default();
        for name in part {
            leaf.inline(name.as_bytes(), b"");
        }
        leaves.push((leaf.finish(&mut repo), 3, part[0].as_bytes()));
    }
    let low = repo.index(ListKind::Directory, 1, &leaves[..2]);
    let high = repo.index(ListKind::Directory, 1, &leaves[2..]);
    let huge = repo.index(ListKind::Directory, 2, &[(low, 6, b"n00"), (high, 6, b"n06")]);
    let mut root = DirMaker::default();
    root.file(&mut repo, b"a", b"0123456789", 4);
    root.directory(b"d", d);
    root.directory(b"huge", huge);
    let root = root.finish(&mut repo);
    (repo.finish(), root)
}

#[test]
fn a_walk_visits_everything_in_path_order_and_leaves_what_it_enters() {
    let (source, root) = sample();
    let steps: Vec<String> = reader(&source)
        .walk(root, b"")
        .map(|item| {
            let (path, step) = item.unwrap();
            let path = String::from_utf8(path).unwrap();
            match step {
                Step::Enter(_) => format!("+{path}"),
                Step::Leave => format!("-{path}"),
                Step::Entry(_) => path,
            }
        })
        .collect();
    let mut expected = vec!["a", "+d", "+d/sub", "d/sub/y", "-d/sub", "d/x", "-d", "+huge"];
    let names: Vec<String> = (0..12).map(|i| format!("huge/n{i:02}")).collect();
    expected.extend(names.iter().map(String::as_str));
    expected.push("-huge");
    assert_eq!(steps, expected);
}

#[test]
fn a_skipped_directory_is_not_read() {
    let (source, root) = sample();
    let reader = reader(&source);
    let mut walk = reader.walk(root, b"");
    let mut count = 0;
    while let Some(item) = walk.next() {
        if matches!(item.unwrap().1, Step::Enter(_)) {
            walk.skip_directory();
        }
        count += 1;
    }
    assert_eq!(count, 3);
    assert_eq!(source.fetches.load(Ordering::SeqCst), 1, "only the root was fetched");
}

#[test]
fn paths_resolve_without_reading_whole_directories() {
    let (source, root) = sample();
    let reader = reader(&source);
    let name = |path: &[u8]| match reader.resolve(root, path).unwrap() {
        Resolved::Root(_) => "root".to_owned(),
        Resolved::Entry(entry) => String::from_utf8(entry.entry.name).unwrap(),
    };
    assert_eq!(name(b""), "root");
    assert_eq!(name(b"/"), "root");
    assert_eq!(name(b"/d/sub//y"), "y");
    assert_eq!(name(b"./huge/n07"), "n07");
    assert!(matches!(reader.resolve(root, b"huge/n99"), Err(TreeError::NotFound { .. })));
    assert!(matches!(reader.resolve(root, b"huge/a"), Err(TreeError::NotFound { .. })));
    assert!(matches!(reader.resolve(root, b"d/x/z"), Err(TreeError::NotADirectory { path }) if path == "/d/x"));
    assert!(matches!(reader.resolve(root, b"d/../a"), Err(TreeError::NotFound { .. })));
}

#[test]
fn content_lists_are_walked_node_by_node() {
    let mut repo = MemoryRepository::new();
    let mut lower = Vec::new();
    let mut expected = Vec::new();
    for part in 0..3u8 {
        let id = repo.chunk(ChunkKind::Data, &[part; 5], &[]);
        let pieces = vec![Piece { position: 0, bytes: 5 }; 2];
        expected.extend([(id, 5), (id, 5)]);
        lower.push((repo.node(ListKind::Content, NodeBody::Content(pieces), &[Reference::data(id)]), 10, &b""[..]));
    }
    let top = repo.index(ListKind::Content, 1, &lower);
    let mut root = DirMaker::default();
    let position = root.position(Reference::tree(top));
    root.add(b"f", EntryNode::File { size: 30, content: Content::List { position }, holes: vec![] });
    let root = root.finish(&mut repo);
    let reader = reader(&repo.finish());
    let entry = reader.find(root, b"f").unwrap().unwrap();
    let found: Vec<_> = reader.pieces(&entry).map(Result::unwrap).collect();
    assert_eq!(found, expected);
}

#[test]
fn error_lists_read_back() {
    let mut repo = MemoryRepository::new();
    let error = |path: &[u8]| SourceError { path: path.to_vec(), message: "vanished".into() };
    let a = repo.node(ListKind::Errors, NodeBody::Errors(vec![error(b"/a")]), &[]);
    let b = repo.node(ListKind::Errors, NodeBody::Errors(vec![error(b"/b"), error(b"/c")]), &[]);
    let top = repo.index(ListKind::Errors, 1, &[(a, 1, b""), (b, 2, b"")]);
    let found: Vec<_> = reader(&repo.finish()).source_errors(top).map(|error| error.unwrap().path).collect();
    assert_eq!(found, [b"/a", b"/b", b"/c"]);
}

#[test]
fn s42_a_name_that_comes_again_in_the_next_node_is_refused() {
    let mut repo = MemoryRepository::new();
    let mut first = DirMaker::default();
    first.symlink(b"a", b"/etc");
    let first = first.finish(&mut repo);
    let inner = DirMaker::default().finish(&mut repo);
    let mut second = DirMaker::default();
    second.directory(b"a", inner);
    let second = second.finish(&mut repo);
    let top = repo.index(ListKind::Directory, 1, &[(first, 1, b"a"), (second, 1, b"b")]);
    let reader = reader(&repo.finish());
    let items: Vec<_> = reader.entries(top).collect();
    assert!(items[0].is_ok());
    assert!(matches!(items[1], Err(TreeError::Contradiction { .. })));
    assert_eq!(items.len(), 2);
}

#[test]
fn s43_lists_whose_levels_do_not_descend_are_refused() {
    let mut repo = MemoryRepository::new();
    let leaf = DirMaker::default().finish(&mut repo);
    let inner = repo.index(ListKind::Directory, 3, &[(leaf, 0, b"a")]);
    let outer = repo.index(ListKind::Directory, 3, &[(inner, 0, b"a")]);
    let errors = repo.node(ListKind::Errors, NodeBody::Errors(vec![]), &[]);
    let reader = reader(&repo.finish());
    assert!(matches!(reader.entries(outer).next(), Some(Err(TreeError::Contradiction { .. }))));
    assert!(matches!(reader.find(outer, b"a"), Err(TreeError::Contradiction { .. })));
    assert!(matches!(reader.entries(errors).next(), Some(Err(TreeError::Contradiction { .. }))));
    assert!(matches!(reader.find(errors, b"a"), Err(TreeError::Contradiction { .. })));
}

#[test]
fn s48_a_position_that_points_to_the_wrong_kind_is_refused() {
    let mut repo = MemoryRepository::new();
    let data = repo.chunk(ChunkKind::Data, b"data", &[]);
    let mut root = DirMaker::default();
    let position = root.position(Reference::data(data));
    root.add(b"d", EntryNode::Directory { position });
    let root = root.finish(&mut repo);
    let walked: Vec<_> = reader(&repo.finish()).walk(root, b"").collect();
    let Err(WalkError { path, error }) = &walked[0] else { panic!("it was walked") };
    assert!(path == b"d" && matches!(**error, TreeError::Contradiction { .. }));
}

#[test]
fn an_unreadable_directory_does_not_hide_its_neighbours() {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    root.directory(b"gone", ChunkId([9; 32]));
    root.inline(b"here", b"");
    let root = root.finish(&mut repo);
    let walked: Vec<_> = reader(&repo.finish()).walk(root, b"").collect();
    assert!(matches!(walked[0], Ok((_, Step::Enter(_)))));
    let Err(WalkError { error, .. }) = &walked[1] else { panic!("it was walked") };
    assert!(matches!(**error, TreeError::Fetch(FetchError::Missing { .. })));
    assert!(matches!(walked[2], Ok((_, Step::Leave))));
    assert!(matches!(walked[3], Ok((_, Step::Entry(_)))));
}

#[test]
fn the_cache_of_blocks_is_bounded_and_siblings_come_in_one_fetch() {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    for number in 0..60u32 {
        let mut dir = DirMaker::default();
        dir.inline(&number.to_le_bytes().map(|byte| byte | 0x40), &[1; 2000]);
        let top = dir.finish(&mut repo);
        root.directory(format!("{number:02}").as_bytes(), top);
    }
    let root = root.finish(&mut repo);
    let source = repo.finish();
    let large = reader(&source);
    assert_eq!(large.walk(root, b"").flatten().count(), 180);
    assert!(source.fetches.swap(0, Ordering::SeqCst) <= 5);
    let small = TreeReader::new(source, 10);
    assert_eq!(small.walk(root, b"").flatten().count(), 180);
}
