use std::collections::BTreeMap;

use super::*;

#[derive(Default)]
struct Nodes(BTreeMap<ChunkId, (Vec<u8>, Vec<Reference>)>);

impl NodeSink for Nodes {
    fn node(&mut self, node: &TreeNodeV1, references: Vec<Reference>) -> Result<ChunkId, BackupError> {
        let bytes = node.encode();
        assert!(bytes.len() <= limits::CHUNK_BYTES_MAX, "{}", bytes.len());
        assert!(references.len() <= REFERENCES_MAX);
        assert_eq!(TreeNodeV1::decode(&bytes, references.len()).as_ref(), Ok(node));
        let id = strandline_messages::format::chunk::chunk_id(
            &[1; 32],
            strandline_messages::ids::ChunkKind::Tree,
            &bytes,
            &references,
        );
        self.0.insert(id, (bytes, references));
        Ok(id)
    }
}

impl Nodes {
    fn leaves(&self, top: ChunkId) -> Vec<(TreeNodeV1, Vec<Reference>)> {
        let (bytes, references) = &self.0[&top];
        let node = TreeNodeV1::decode(bytes, references.len()).unwrap();
        match &node.body {
            NodeBody::Index { children, .. } => {
                assert!(children.len() > 1 || !references.is_empty());
                children.iter().flat_map(|child| self.leaves(references[child.position as usize].id)).collect()
            }
            _ => vec![(node, references.clone())],
        }
    }
}

fn id(n: u64) -> ChunkId {
    ChunkId(*blake3::hash(&n.to_le_bytes()).as_bytes())
}

fn directory(nodes: &mut Nodes, names: impl Iterator<Item = u64>) -> ChunkId {
    let mut builder = DirectoryBuilder::default();
    for n in names {
        let name = format!("file{n:09}");
        let pieces = vec![FilePiece { id: id(n), bytes: 5 }];
        let content = FileContent::Pieces(pieces);
        let node = NewNode::File { size: 5, content, holes: Vec::new() };
        let entry = NewEntry { name: name.as_bytes(), meta: &Meta::default(), xattrs: Vec::new(), node };
        builder.add(entry, Owner::default, &[3; 32], nodes).unwrap();
    }
    builder.finish(nodes).unwrap()
}

#[test]
fn a_huge_directory_becomes_levels_and_one_new_name_changes_one_node_per_level() {
    let mut nodes = Nodes::default();
    let top = directory(&mut nodes, (0..60_000).map(|n| n * 2));
    let count = |node: &TreeNodeV1| match &node.body {
        NodeBody::Directory { entries, .. } => entries.len(),
        _ => 0,
    };
    let leaves = nodes.leaves(top);
    assert!(leaves.len() > 5);
    assert_eq!(leaves.iter().map(|(node, _)| count(node)).sum::<usize>(), 60_000);
    let before = nodes.0.len();
    let changed = directory(&mut nodes, (0..60_000).map(|n| n * 2).chain(std::iter::once(120_001)));
    assert_ne!(top, changed);
    assert!(nodes.0.len() <= before + 3);
    assert_eq!(directory(&mut nodes, (0..60_000).map(|n| n * 2)), top);
}

#[test]
fn directories_and_lists_of_every_small_size_have_a_top() {
    for n in [0, 1, 2, 1023, 1024, 1025, 8191, 8192, 8193] {
        let mut nodes = Nodes::default();
        let top = directory(&mut nodes, 0..n);
        let entries = |node: &TreeNodeV1| match &node.body {
            NodeBody::Directory { entries, .. } => entries.len() as u64,
            _ => 0,
        };
        assert_eq!(nodes.leaves(top).iter().map(|(node, _)| entries(node)).sum::<u64>(), n);
    }
}

#[test]
fn a_long_content_list_keeps_every_piece_in_order() {
    for n in [0u64, 1, 1024, 1025, 8192, 8193, 50_000] {
        for same in [false, true] {
            let mut nodes = Nodes::default();
            let mut builder = ContentBuilder::default();
            let wanted: Vec<ChunkId> = (0..n).map(|i| id(if same { 0 } else { i })).collect();
            for &id in &wanted {
                builder.add(FilePiece { id, bytes: 7 }, &mut nodes).unwrap();
            }
            let got: Vec<ChunkId> = match builder.finish(&mut nodes).unwrap() {
                FileContent::Inline(_) => unreachable!(),
                FileContent::Pieces(pieces) => pieces.iter().map(|piece| piece.id).collect(),
                FileContent::List(top) => {
                    let ids = |(node, references): (TreeNodeV1, Vec<Reference>)| match node.body {
                        NodeBody::Content(pieces) => {
                            pieces.iter().map(|piece| references[piece.position as usize].id).collect::<Vec<_>>()
                        }
                        _ => Vec::new(),
                    };
                    nodes.leaves(top).into_iter().flat_map(ids).collect()
                }
            };
            assert_eq!(got, wanted);
            assert_eq!(builder.finish(&mut nodes).unwrap(), FileContent::Pieces(Vec::new()));
        }
    }
}

#[test]
fn entries_with_many_references_and_bytes_do_not_exceed_the_limits() {
    let mut nodes = Nodes::default();
    let mut builder = DirectoryBuilder::default();
    for n in 0..40u64 {
        let pieces = (0..1024).map(|i| FilePiece { id: id(n * 1024 + i), bytes: 9 }).collect();
        let xattrs = (0..8).map(|i| Xattr { name: vec![b'a' + i], value: vec![7; 60_000] }).collect();
        let node = NewNode::File { size: 9, content: FileContent::Pieces(pieces), holes: Vec::new() };
        let name = format!("{n:04}");
        let entry = NewEntry { name: name.as_bytes(), meta: &Meta::default(), xattrs, node };
        builder.add(entry, Owner::default, &[3; 32], &mut nodes).unwrap();
    }
    let top = builder.finish(&mut nodes).unwrap();
    assert!(nodes.leaves(top).len() >= 20);
}

#[test]
fn errors_become_a_list_and_none_becomes_nothing() {
    let mut nodes = Nodes::default();
    assert_eq!(ErrorListBuilder::default().finish(&mut nodes).unwrap(), None);
    let mut builder = ErrorListBuilder::default();
    for n in 0..20_000 {
        builder.add(format!("/p/{n}").into_bytes(), "é".repeat(3000), &mut nodes).unwrap();
    }
    assert_eq!(builder.count(), 20_000);
    let top = builder.finish(&mut nodes).unwrap().unwrap();
    let errors = |node: &TreeNodeV1| match &node.body {
        NodeBody::Errors(errors) => errors.len(),
        _ => 0,
    };
    assert_eq!(nodes.leaves(top).iter().map(|(node, _)| errors(node)).sum::<usize>(), 20_000);
}
