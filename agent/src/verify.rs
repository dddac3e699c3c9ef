//! Verifying snapshots with the key: every tree is opened, decoded and walked, and with `read_data` every piece of every file
//! is fetched and compared with its id. What the server can tell without a key (digests, completeness) is its scrub's.
//!
//! Trees that several snapshots share are walked once, and chunks that were read are not read again, as far as a memory of
//! [`REMEMBERED_MAX`] ids reaches; beyond it they are read again, which costs time and nothing else.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use strandline_messages::format::tree::{Content, EntryNode};
use strandline_messages::{BlockDigest, ChunkId, limits};

use crate::seal::OpenError;
use crate::trees::{ChunkSource, DirEntry, FetchError, Step, TreeError, TreeReader};

/// Most ids of each kind that are remembered, 16 bytes each.
pub const REMEMBERED_MAX: usize = 4 << 20;
/// Opened tree blocks kept, bytes.
const CACHE_BYTES: usize = 32 << 20;
/// Problems that are kept one by one; the rest is counted.
const PROBLEMS_MAX: usize = 1000;

/// What was read so far; others may look meanwhile.
#[derive(Debug, Default)]
pub struct Progress {
    /// Directories, files and others walked.
    pub entries: AtomicU64,
    /// Data chunks read and compared.
    pub chunks: AtomicU64,
    /// Their plaintext, bytes.
    pub bytes: AtomicU64,
    /// Set to stop soon.
    pub cancel: AtomicBool,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The path in the snapshot, raw.
    pub path: Vec<u8>,
    /// What is wrong, for people.
    pub reason: String,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Findings {
    /// The first problems.
    pub problems: Vec<Problem>,
    /// How many there are.
    pub problems_total: u64,
    /// Chunks that a block with a right digest does not really hold, for [`strandline_messages::wire::manage::Operation::ReportDamage`].
    pub wrong: Vec<(ChunkId, BlockDigest)>,
    /// The repository cannot be read any more.
    pub lost: Option<String>,
}

/// A bounded set of ids by their first 16 bytes.
#[derive(Default)]
struct Remembered(HashSet<[u8; 16]>);

impl Remembered {
    fn short(id: &ChunkId) -> [u8; 16] {
        let [short @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = *id.as_bytes();
        short
    }

    fn contains(&self, id: &ChunkId) -> bool {
        self.0.contains(&Self::short(id))
    }

    fn insert(&mut self, id: &ChunkId) {
        if self.0.len() < REMEMBERED_MAX {
            self.0.insert(Self::short(id));
        }
    }
}

/// Verifies one snapshot after another.
pub struct Verifier {
    read_data: bool,
    progress: Arc<Progress>,
    trees: Remembered,
    chunks: Remembered,
    /// Pieces that wait to be fetched, with the file that needs each first.
    wanted: Vec<(ChunkId, Arc<[u8]>)>,
    findings: Findings,
}

impl Verifier {
    /// `read_data`: whether files' content is read, too.
    pub fn new(read_data: bool, progress: Arc<Progress>) -> Self {
        let (trees, chunks, wanted, findings) = Default::default();
        Self { read_data, progress, trees, chunks, wanted, findings }
    }

    /// Walks the tree under `root`, which comes from `source`, and returns what was found in it. Blocks the calling thread.
    pub fn verify(&mut self, source: &Arc<dyn ChunkSource>, root: ChunkId, errors: Option<ChunkId>) -> Findings {
        let reader = TreeReader::new(Arc::clone(source), CACHE_BYTES);
        if !self.trees.contains(&root) {
            self.walk(&reader, root);
        }
        if let Some(errors) = errors {
            for error in reader.source_errors(errors) {
                if let Err(error) = error {
                    self.tree_problem(b"(list of errors)", &error);
                    break;
                }
            }
        }
        self.fetch(source.as_ref());
        std::mem::take(&mut self.findings)
    }

    fn walk(&mut self, reader: &TreeReader, root: ChunkId) {
        let before = self.findings.problems_total;
        let mut walk = reader.walk(root, b"");
        // Directories that the walk is in, and how many problems there were when it entered.
        let mut inside: Vec<(ChunkId, u64)> = Vec::new();
        while let Some(step) = walk.next() {
            if self.findings.lost.is_some() || self.progress.cancel.load(Ordering::Relaxed) {
                return;
            }
            self.progress.entries.fetch_add(1, Ordering::Relaxed);
            match step {
                Ok((_, Step::Enter(entry))) => match entry.directory_top() {
                    Ok(Some(top)) if self.trees.contains(&top) => walk.skip_directory(),
                    Ok(top) => inside.push((top.unwrap_or(root), self.findings.problems_total)),
                    Err(_) => {}
                },
                Ok((_, Step::Leave)) => {
                    if let Some((top, problems)) = inside.pop()
                        && problems == self.findings.problems_total
                    {
                        self.trees.insert(&top);
                    }
                }
                Ok((path, Step::Entry(entry))) => self.file(reader, &path, &entry),
                Err(problem) => self.tree_problem(&problem.path, &problem.error),
            }
        }
        if before == self.findings.problems_total {
            self.trees.insert(&root);
        }
    }

    fn file(&mut self, reader: &TreeReader, path: &[u8], entry: &DirEntry) {
        let has_pieces = match &entry.entry.node {
            EntryNode::File { content: Content::List { .. }, .. } => true,
            EntryNode::File { content: Content::Pieces(_), .. } => self.read_data,
            _ => false,
        };
        if !has_pieces {
            return;
        }
        let name: Arc<[u8]> = path.into();
        for piece in reader.pieces(entry) {
            match piece {
                Ok((chunk, _)) if self.read_data && !self.chunks.contains(&chunk) => {
                    self.chunks.insert(&chunk);
                    self.wanted.push((chunk, Arc::clone(&name)));
                    if self.wanted.len() >= limits::FETCH_IDS_MAX / 8 {
                        self.fetch(reader.source().as_ref());
                    }
                }
                Ok(_) => {}
                Err(error) => return self.tree_problem(path, &error),
            }
        }
    }

    /// Reads the pieces that wait and compares them with their ids.
    fn fetch(&mut self, source: &dyn ChunkSource) {
        let wanted = std::mem::take(&mut self.wanted);
        if wanted.is_empty() {
            return;
        }
        let mut missing: std::collections::HashMap<ChunkId, Arc<[u8]>> = wanted.iter().cloned().collect();
        let ids = wanted.into_iter().map(|(id, _)| id).collect();
        let blocks = match source.fetch(ids) {
            Ok(blocks) => blocks,
            Err(error) => return self.fetch_problem(&error, &missing),
        };
        for block in blocks {
            let block = match block {
                Ok(block) => block,
                Err(error) => {
                    self.fetch_problem(&error, &missing);
                    if let FetchError::Missing { chunks }
                    | FetchError::Damaged { chunks, .. }
                    | FetchError::Unreadable { chunks, .. } = &error
                    {
                        for chunk in chunks {
                            missing.remove(chunk);
                        }
                    }
                    continue;
                }
            };
            for (place, row) in block.rows().iter().enumerate() {
                let Some(path) = missing.remove(&row.id) else { continue };
                match block.chunk(place) {
                    Ok(chunk) => {
                        self.progress.chunks.fetch_add(1, Ordering::Relaxed);
                        self.progress.bytes.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
                    }
                    Err(error) => {
                        if let OpenError::WrongChunk { block, chunk } = &error {
                            self.findings.wrong.push((*chunk, *block));
                        }
                        self.problem(&path, error.to_string());
                    }
                }
            }
        }
        if self.findings.lost.is_none() {
            for (chunk, path) in missing {
                self.problem(&path, format!("chunk {chunk} did not come"));
            }
        }
    }

    fn fetch_problem(&mut self, error: &FetchError, wanted: &std::collections::HashMap<ChunkId, Arc<[u8]>>) {
        match error {
            FetchError::Lost { reason } => self.findings.lost = Some(reason.clone()),
            FetchError::Missing { chunks }
            | FetchError::Damaged { chunks, .. }
            | FetchError::Unreadable { chunks, .. } => {
                for chunk in chunks {
                    let path = wanted.get(chunk).cloned().unwrap_or_else(|| b"?".as_slice().into());
                    self.problem(&path, error.to_string());
                }
            }
        }
    }

    fn tree_problem(&mut self, path: &[u8], error: &TreeError) {
        match error {
            TreeError::Fetch(FetchError::Lost { reason }) => self.findings.lost = Some(reason.clone()),
            TreeError::Open(OpenError::WrongChunk { block, chunk }) => {
                self.findings.wrong.push((*chunk, *block));
                self.problem(path, error.to_string());
            }
            _ => self.problem(path, error.to_string()),
        }
    }

    fn problem(&mut self, path: &[u8], reason: String) {
        self.findings.problems_total += 1;
        if self.findings.problems.len() < PROBLEMS_MAX {
            self.findings.problems.push(Problem { path: path.to_vec(), reason });
        }
    }
}
