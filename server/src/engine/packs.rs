//! What a start does with a repository's packs: recovers those without footer and brings the index up to them.
//!
//! The index is caught up from footers and chunk tables alone; bodies are read only where a pack has to be scanned. A table
//! that rotted can at worst hide a chunk, which is then sent again: the digest is compared whenever a block is read.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use strandline_messages::format::FormatError;
use strandline_messages::format::block::{BlockHeaderV1, FIXED_HEADER_BYTES, TableRows};
use strandline_messages::format::pack::FooterEntry;
use strandline_messages::format::pack_state::StateRecordV1;
use strandline_messages::{ChunkId, ChunkKind, DomainId, RepositoryId};

use super::state::{PackRange, TreeBlock};
use super::{Common, EngineError};
use crate::failpoint;
use crate::index::engine::SegmentIndex;
use crate::index::{ChunkIndex, Copy, IndexError};
use crate::storage::layout::{RepositoryPaths, pack_number};
use crate::storage::pack_file::{self, PackContents, PackInfo};
use crate::storage::pack_state;
use crate::storage::{StorageError, files};

/// A repository's packs and index after recovery.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub packs: Vec<PackInfo>,
    pub index: SegmentIndex,
    pub next_pack: u32,
    /// What the packs' state files say.
    pub recorded: HashMap<u32, Vec<StateRecordV1>>,
    /// The blocks of packs that had no footer: what was being written when the process before ended.
    pub unsealed: Vec<PackRange>,
    /// Tree blocks that the index did not hold, or whose flags a crash may have lost, in the order of packs.
    pub trees: Vec<(DomainId, TreeBlock)>,
    /// Packs that are gone for good, of which the catalog knows nothing of that yet.
    pub dropped: Vec<u32>,
}

/// Recovers every pack of a repository and catches its index up. `rows` is what the catalog remembers of the packs; `used` is
/// the highest number of a pack that it remembers anything of.
pub(crate) fn recover(
    common: &Common,
    paths: &RepositoryPaths,
    repository: RepositoryId,
    rows: &HashMap<u32, PackInfo>,
    used: u32,
) -> Result<Recovered, EngineError> {
    for directory in [paths.packs(), paths.snapshots(), paths.keys(), paths.index()] {
        files::create_directory(&directory)?;
        files::remove_temporaries(&directory)?;
    }
    let listed = list_packs(paths)?;
    let mut packs = BTreeMap::new();
    let mut scanned = HashMap::new();
    let mut recorded = HashMap::new();
    for &number in &listed.packs {
        let records = pack_state::read(paths, repository, number)?;
        if !records.is_empty() {
            recorded.insert(number, records);
        }
        match open_pack(common, paths, repository, number, rows.get(&number))? {
            None => {}
            Some(Opened::Known(info)) => {
                packs.insert(number, info);
            }
            Some(Opened::Scanned(contents)) => {
                packs.insert(number, contents.info);
                scanned.insert(number, contents);
            }
        }
    }
    let unsealed = scanned.values().map(|contents: &PackContents| PackRange {
        pack: contents.info.number,
        start: 0,
        end: contents.info.blocks_end,
    });
    let unsealed = unsealed.collect();
    let gone = recorded.iter().flat_map(|(&pack, records): (&u32, &Vec<StateRecordV1>)| {
        records.iter().map(move |record| (pack, record.offset))
    });
    let found = Found { packs: &packs, scanned: &scanned, gone: gone.collect() };
    let (index, trees) = match catch_up(common, paths, repository, &found, false) {
        Err(EngineError::Index(error @ IndexError::Damaged { .. })) => {
            tracing::warn!(%error, "the chunk index is built again from the packs");
            catch_up(common, paths, repository, &found, true)?
        }
        other => other?,
    };
    let found: BTreeSet<u32> = listed.packs.iter().chain(&listed.states).copied().collect();
    for number in found.into_iter().filter(|&number| index.is_dropped(number)) {
        remove_pack(paths, number)?;
        packs.remove(&number);
        recorded.remove(&number);
    }
    let dropped = rows.keys().copied().filter(|&number| index.is_dropped(number)).collect();
    // A pack that is gone may be remembered still, and a new one of its number would be taken for it.
    let next_pack = listed.next.max(used.max(index.highest_pack()).saturating_add(1));
    Ok(Recovered { packs: packs.into_values().collect(), index, next_pack, recorded, unsealed, trees, dropped })
}

/// Removes a pack that the index knows as dropped, and its state file after it. Whatever a crash leaves of that, the next start
/// removes.
pub(crate) fn remove_pack(paths: &RepositoryPaths, number: u32) -> Result<(), StorageError> {
    let (directory, pack, state) = (paths.packs(), paths.pack(number), paths.pack_state(number));
    let remove = |path: &Path| match fs::remove_file(path) {
        // Nothing new is written to a medium that cannot be written, either.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem) => Ok(()),
        other => other.map_err(StorageError::io("remove", path)),
    };
    remove(&pack)?;
    failpoint::reached("pack/removed");
    files::sync_directory(&directory)?;
    remove(&state)?;
    failpoint::reached("pack-state/removed");
    Ok(())
}

/// What the directory of packs holds, by name.
struct Listed {
    /// The packs, ascending.
    packs: Vec<u32>,
    /// The packs that have a state file.
    states: Vec<u32>,
    /// The first number after all of them.
    next: u32,
}

fn list_packs(paths: &RepositoryPaths) -> Result<Listed, EngineError> {
    let directory = paths.packs();
    let mut listed = Listed { packs: Vec::new(), states: Vec::new(), next: 1 };
    for entry in fs::read_dir(&directory).map_err(StorageError::io("list", &directory))? {
        let name = entry.map_err(StorageError::io("list", &directory))?.file_name();
        let Some((number, extension)) = name.to_str().and_then(pack_number) else { continue };
        listed.next = listed.next.max(number.saturating_add(1));
        match extension {
            "pack" => listed.packs.push(number),
            "state" => listed.states.push(number),
            _ => {}
        }
    }
    listed.packs.sort_unstable();
    Ok(listed)
}

enum Opened {
    Known(PackInfo),
    Scanned(PackContents),
}

fn open_pack(
    common: &Common,
    paths: &RepositoryPaths,
    repository: RepositoryId,
    number: u32,
    row: Option<&PackInfo>,
) -> Result<Option<Opened>, EngineError> {
    let path = paths.pack(number);
    let file_bytes = fs::metadata(&path).map_err(StorageError::io("open", &path))?.len();
    if let Some(row) = row
        && row.sealed
        && row.file_bytes == file_bytes
    {
        return Ok(Some(Opened::Known(*row)));
    }
    let file = files::open_or_read(File::options().read(true).write(true), &path);
    let file = file.map_err(StorageError::io("open", &path))?;
    let domain = match pack_file::read_header(&file, &path) {
        Ok(header) if header.repository == repository && header.number == number => header.domain,
        Err(error @ StorageError::Io { .. }) => return Err(error.into()),
        _ => {
            let Some(row) = row else {
                set_aside(paths, number)?;
                return Ok(None);
            };
            row.domain
        }
    };
    if pack_file::read_footer(&file, &path)?.is_some() {
        let contents = pack_file::contents(&file, &path, number, domain, repository)?;
        return Ok(Some(Opened::Known(contents.info)));
    }
    let contents = pack_file::recover(common.ops.as_ref(), &file, &path, number, domain, repository)?;
    Ok(Some(Opened::Scanned(contents)))
}

/// A pack whose header cannot be read belongs to no domain. A crash leaves one while nothing in it is acknowledged yet.
fn set_aside(paths: &RepositoryPaths, number: u32) -> Result<(), EngineError> {
    let (from, to) = (paths.pack(number), paths.damaged_pack(number));
    tracing::warn!(path = %to.display(), "a pack without a readable header was set aside");
    match fs::rename(&from, &to) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => return Ok(()),
        other => other.map_err(StorageError::io("rename", &from))?,
    }
    failpoint::reached("pack/set-aside");
    Ok(files::sync_directory(&paths.packs())?)
}

type CaughtUp = (SegmentIndex, Vec<(DomainId, TreeBlock)>);

/// What was found of the packs.
struct Found<'a> {
    packs: &'a BTreeMap<u32, PackInfo>,
    scanned: &'a HashMap<u32, PackContents>,
    /// Blocks that were freed or withdrawn.
    gone: HashSet<(u32, u32)>,
}

fn catch_up(
    common: &Common,
    paths: &RepositoryPaths,
    repository: RepositoryId,
    found: &Found<'_>,
    anew: bool,
) -> Result<CaughtUp, EngineError> {
    let (packs, scanned) = (found.packs, found.scanned);
    let directory = paths.index();
    let open = if anew { SegmentIndex::anew } else { SegmentIndex::open };
    let index = open(&directory, Arc::clone(&common.cache), common.sizes.index_flush_entries)?;
    let fits = |&pack: &u32| packs.get(&pack).is_some_and(|info| index.covered(pack) <= info.blocks_end);
    if !index.covered_packs().iter().all(fits) {
        return Err(IndexError::damaged(&directory, "it covers packs that are not there").into());
    }
    let mut trees = Vec::new();
    for info in packs.values() {
        let covered = index.covered(info.number);
        let scan = scanned.get(&info.number);
        if covered >= info.blocks_end && scan.is_none() {
            continue;
        }
        let path = paths.pack(info.number);
        let file = File::open(&path).map_err(StorageError::io("open", &path))?;
        let blocks = match scan {
            Some(contents) => contents.blocks.clone(),
            None => pack_file::contents(&file, &path, info.number, info.domain, repository)?.blocks,
        };
        for block in blocks.iter().filter(|block| !found.gone.contains(&(info.number, block.offset))) {
            if block.offset >= covered {
                insert_block(&index, info, &file, &path, block)?;
            }
            if block.kind == ChunkKind::Tree {
                let (pack, offset, bytes) = (info.number, block.offset, block.bytes);
                trees.push((info.domain, TreeBlock { sequence: trees.len() as u64, pack, offset, bytes }));
            }
        }
        if covered < info.blocks_end {
            index.insert(info.domain, info.number, info.blocks_end, &[])?;
        }
    }
    Ok((index, trees))
}

fn insert_block(
    index: &SegmentIndex,
    info: &PackInfo,
    file: &File,
    path: &Path,
    block: &FooterEntry,
) -> Result<(), EngineError> {
    let ids = match read_ids(file, block).map_err(StorageError::io("read", path))? {
        Ok(ids) => ids,
        Err(error) => {
            tracing::error!(pack = info.number, offset = block.offset, %error, "a block is damaged and is not indexed; the next backup of that data sends it again");
            return Ok(());
        }
    };
    let copy = |position| Copy {
        pack: info.number,
        offset: block.offset,
        bytes: block.bytes,
        position,
        kind: block.kind,
        complete: false,
    };
    let copies: Vec<(ChunkId, Copy)> = (0u16..).zip(ids).map(|(position, id)| (id, copy(position))).collect();
    let end = block.offset.saturating_add(block.bytes);
    Ok(index.insert(info.domain, info.number, end, &copies)?)
}

/// Reads header and chunk table of a block, not its body.
fn read_ids(file: &File, block: &FooterEntry) -> io::Result<Result<Vec<ChunkId>, FormatError>> {
    let mut fixed = [0; FIXED_HEADER_BYTES];
    file.read_exact_at(&mut fixed, block.offset.into())?;
    let header = match BlockHeaderV1::decode(&fixed) {
        Ok(header) if header.block_bytes() == block.bytes as usize && header.kind == block.kind => header,
        Ok(_) => return Ok(Err(FormatError::Invalid { what: "block", why: "it is not the one its pack lists" })),
        Err(error) => return Ok(Err(error)),
    };
    let mut table = vec![0; header.table_bytes as usize];
    let at = u64::from(block.offset) + FIXED_HEADER_BYTES as u64 + u64::from(header.wrapped_key_bytes);
    file.read_exact_at(&mut table, at)?;
    let rows = TableRows::new(header.kind, header.chunks, &table);
    Ok(rows.map(|row| row.map(|row| row.id)).collect())
}
