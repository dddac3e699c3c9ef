//! Scrubbing: reading blocks again and comparing their digests, without keys. Those whose last verification is longest ago
//! come first; what is damaged is withdrawn. Subsets by size go on in a pack where the one before stopped.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use strandline_actors::runtime::clock;
use strandline_messages::format::pack::FooterEntry;
use strandline_messages::limits;
use strandline_messages::wire::manage::{ScrubReport, ScrubSubset};

use super::known::BlockState;
use super::state::State;
use super::{EngineError, Repository, blocking};
use crate::catalog::repositories::BlockPlace;
use crate::catalog::verified::VerifiedRow;
use crate::storage::StorageError;
use crate::storage::pack_file::{self, PackInfo};

/// Bytes that are read between two notes of how far a pack was verified.
const NOTE_BYTES: u64 = 64 << 20;

/// A scrub that keeps to its rate looks at least so often whether it is to stop.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// One pack and how far it was verified.
struct Turn {
    info: PackInfo,
    row: VerifiedRow,
}

impl Repository {
    /// Reads the blocks of `subset` again, at most `bytes_per_second` (0: no limit). Blocks in packs that are still written to
    /// are left for the next time. Other maintenance may have its turn between two packs.
    pub async fn scrub(&self, subset: ScrubSubset, bytes_per_second: u64) -> Result<ScrubReport, EngineError> {
        let state = &self.state;
        let withdrawn_before = state.blocks.read().await.count(|state| state == BlockState::Withdrawn);
        let mut report = ScrubReport { withdrawn_before, ..ScrubReport::default() };
        let turns = self.turns(subset).await?;
        let budget = match subset {
            ScrubSubset::All | ScrubSubset::Part { .. } => u64::MAX,
            ScrubSubset::Bytes { bytes } => bytes,
            ScrubSubset::Share { permille } => {
                let all: u64 = state.pack_infos().iter().map(|info| u64::from(info.blocks_end)).sum();
                (all / 1000).saturating_mul(permille.into()).max(1)
            }
        };
        let began = clock::now();
        for turn in turns {
            if report.bytes >= budget {
                break;
            }
            let _one_at_a_time = state.maintaining.lock().await;
            if !state.pack_infos().contains(&turn.info) {
                // It was removed since.
                continue;
            }
            let damaged = self.scrub_pack(turn, budget, &mut report, (began, bytes_per_second)).await?;
            self.withdraw(&damaged).await?;
        }
        if report.damaged_blocks + report.withdrawn_before > 0 {
            report.affected = self.affected_snapshots(limits::DAMAGE_ROWS_MAX).await?;
        }
        report.oldest_ns = self.oldest_verification().await?;
        Ok(report)
    }

    /// The packs of the subset, those verified longest ago first.
    async fn turns(&self, subset: ScrubSubset) -> Result<Vec<Turn>, EngineError> {
        let state = &self.state;
        let rows = state.common.catalog.verified(state.number).await?;
        let mine = |info: &PackInfo| match subset {
            ScrubSubset::Part { part, of } => info.number % of.max(1) == part.saturating_sub(1) % of.max(1),
            _ => true,
        };
        // Who asks for all of it means all of it; a part may go on where the one before stopped.
        let whole = matches!(subset, ScrubSubset::All | ScrubSubset::Part { .. });
        let sealed = state.pack_infos().into_iter().filter(|info| info.sealed && mine(info));
        let mut turns: Vec<Turn> = sealed
            .map(|info| {
                let mut row = rows.get(&info.number).copied().unwrap_or_default();
                if row.done_offset >= info.blocks_end {
                    row = VerifiedRow { done_offset: 0, this_ns: 0, last_ns: row.this_ns };
                } else if whole {
                    row.done_offset = 0;
                }
                Turn { info, row }
            })
            .collect();
        turns.sort_by_key(|turn| (turn.row.last_ns, turn.info.number));
        Ok(turns)
    }

    async fn scrub_pack(
        &self,
        turn: Turn,
        budget: u64,
        report: &mut ScrubReport,
        (began, bytes_per_second): (std::time::Instant, u64),
    ) -> Result<Vec<BlockPlace>, EngineError> {
        let state = &self.state;
        let Turn { info, mut row } = turn;
        let (mut damaged, mut noted) = (Vec::new(), report.bytes);
        row.this_ns = clock::wall_ns();
        let (blocks, frame) = {
            let state = Arc::clone(state);
            blocking(move || listed(&state, info)).await?
        };
        if !frame.is_empty() {
            report.damaged_packs += 1;
            report.damaged.extend(frame.into_iter().take(limits::DAMAGE_ROWS_MAX.saturating_sub(report.damaged.len())));
        }
        let from = row.done_offset;
        for entry in blocks.into_iter().filter(|entry| entry.offset >= from) {
            if state.stopping.load(Ordering::Relaxed) {
                return Err(EngineError::Stopping);
            }
            if report.bytes >= budget {
                break;
            }
            let place = (info.number, entry.offset);
            let counts = matches!(
                state.blocks.read().await.of(place.0, place.1),
                BlockState::Live | BlockState::Condemned { .. }
            );
            if counts {
                let checked = {
                    let state = Arc::clone(state);
                    blocking(move || check(&state, info.number, entry)).await?
                };
                report.blocks += 1;
                report.bytes += u64::from(entry.bytes);
                if let Some(reason) = checked {
                    report.damaged_blocks += 1;
                    if report.damaged.len() < limits::DAMAGE_ROWS_MAX {
                        report.damaged.push(reason);
                    }
                    damaged.push(place);
                }
            }
            row.done_offset = entry.offset.saturating_add(entry.bytes);
            if report.bytes - noted >= NOTE_BYTES {
                noted = report.bytes;
                state.common.catalog.note_verified(state.number, info.number, row).await?;
            }
            pace(state, began, report.bytes, bytes_per_second).await;
        }
        if report.bytes < budget {
            row.done_offset = info.blocks_end;
        }
        state.common.catalog.note_verified(state.number, info.number, row).await?;
        Ok(damaged)
    }

    /// When the block was verified whose verification is longest ago, ns since 1970; zero if one never was.
    async fn oldest_verification(&self) -> Result<i64, EngineError> {
        let state = &self.state;
        let rows = state.common.catalog.verified(state.number).await?;
        let verified = |info: &PackInfo| {
            let row = rows.get(&info.number).copied().unwrap_or_default();
            if row.done_offset >= info.blocks_end { row.this_ns } else { row.last_ns }
        };
        Ok(state.pack_infos().iter().filter(|info| info.blocks > 0).map(verified).min().unwrap_or_default())
    }
}

/// The blocks that a sealed pack should have, and what is wrong with its header and its footer, for people.
fn listed(state: &State, info: PackInfo) -> Result<(Vec<FooterEntry>, Vec<String>), EngineError> {
    let path = state.paths.pack(info.number);
    let file = File::open(&path).map_err(StorageError::io("open", &path))?;
    // Advice: where it is ignored, the cache is seen, as by any reader.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    let mut wrong = Vec::new();
    match pack_file::read_header(&file, &path) {
        Ok(header)
            if (header.number, header.repository, header.domain) == (info.number, state.file.id, info.domain) => {}
        Err(error @ StorageError::Io { .. }) => return Err(error.into()),
        _ => wrong.push(format!(
            "the header of pack {:08x} is damaged; its blocks are found without it; keep the catalog",
            info.number
        )),
    }
    if pack_file::read_footer(&file, &path)?.is_none() {
        wrong.push(format!(
            "the footer of pack {:08x} is damaged; its blocks are found without it; `strand-server repair` writes a new one",
            info.number
        ));
    }
    Ok((pack_file::contents(&file, &path, info.number, info.domain, state.file.id)?.blocks, wrong))
}

/// Reads a block off the disk; what is wrong with it, for people.
fn check(state: &State, pack: u32, entry: FooterEntry) -> Result<Option<String>, EngineError> {
    state.reader.forget_cached(pack, entry.offset, entry.bytes)?;
    match state.reader.read_block(pack, entry.offset, entry.bytes) {
        Ok(block) if block.ends_with(entry.digest.as_bytes()) => Ok(None),
        Ok(_) => {
            Ok(Some(format!("the block at offset {} of pack {pack:08x} is another than its pack lists", entry.offset)))
        }
        Err(error @ (StorageError::Damaged { .. } | StorageError::Gone { .. })) => Ok(Some(error.to_string())),
        // A sector that the disk cannot read any more is lost like one that it reads wrong.
        Err(StorageError::Io { source, .. }) if source.raw_os_error() == Some(EIO) => {
            Ok(Some(format!("the block at offset {} of pack {pack:08x} cannot be read: {source}", entry.offset)))
        }
        Err(error) => Err(error.into()),
    }
}

const EIO: i32 = rustix::io::Errno::IO.raw_os_error();

/// Waits until `bytes` since `began` are no more than the rate allows, or the repository is being closed.
async fn pace(state: &State, began: std::time::Instant, bytes: u64, bytes_per_second: u64) {
    if bytes_per_second == 0 {
        return;
    }
    let due = began + Duration::from_millis(bytes.saturating_mul(1000) / bytes_per_second);
    loop {
        let wait = due.saturating_duration_since(clock::now());
        if wait <= Duration::from_millis(20) || state.stopping.load(Ordering::Relaxed) {
            return;
        }
        tokio::time::sleep(wait.min(PAUSE_MAX)).await;
    }
}

#[cfg(test)]
mod tests {
    use strandline_messages::DomainId;

    use super::super::fixture::*;
    use super::super::{CommitOutcome, Engine};
    use super::*;
    use crate::storage::layout::DataPaths;

    struct Site {
        dir: tempfile::TempDir,
        engine: Engine,
        repository: Arc<Repository>,
    }

    /// A snapshot of root 100 over data 1 and 2, each in a block of its own, in one sealed pack.
    async fn site() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).await;
        let repository = repository(&engine).await;
        let lease = session(&repository, 1, DomainId::FULL).await;
        for (sequence, block) in [
            data_block(REPOSITORY, &[id(1)]),
            data_block(REPOSITORY, &[id(2)]),
            tree_block(&[(id(100), &[id(1), id(2)], &[])]),
        ]
        .into_iter()
        .enumerate()
        {
            let sequence = strandline_messages::Sequence(sequence as u64);
            repository.store(&lease, sequence, block.into()).await.unwrap();
        }
        let outcome = repository.commit(&lease, Writer::full().manifest(id(100), "job")).await.unwrap();
        assert!(matches!(outcome, CommitOutcome::Committed { .. }));
        repository.writer.seal_open().await;
        Site { dir, engine, repository }
    }

    impl Site {
        fn pack(&self) -> std::path::PathBuf {
            DataPaths::new(self.dir.path()).repository(&tenant(), &REPOSITORY).pack(1)
        }

        async fn scrub(&self) -> ScrubReport {
            self.repository.scrub(ScrubSubset::All, 0).await.unwrap()
        }

        fn flip(&self, at: usize) {
            let mut bytes = std::fs::read(self.pack()).unwrap();
            bytes[at] ^= 0x20;
            std::fs::write(self.pack(), bytes).unwrap();
        }
    }

    #[actix_rt::test]
    async fn s30_every_byte_of_a_pack_that_is_flipped_is_found() {
        let site = site().await;
        let (state, info) = (Arc::clone(&site.repository.state), site.repository.state.pack_infos()[0]);
        let all = blocking(move || {
            let (blocks, wrong) = listed(&state, info)?;
            assert_eq!((blocks.len(), wrong), (3, Vec::new()));
            let path = state.paths.pack(1);
            let whole = std::fs::read(&path).unwrap();
            for at in 0..whole.len() {
                let mut bad = whole.clone();
                bad[at] ^= 1 << (at % 8);
                std::fs::write(&path, &bad).unwrap();
                let (_, mut wrong) = listed(&state, info)?;
                for entry in &blocks {
                    wrong.extend(check(&state, 1, *entry)?);
                }
                assert!(!wrong.is_empty(), "byte {at} of {}", whole.len());
            }
            Ok(whole.len())
        })
        .await
        .unwrap();
        assert!(all > 1000);
    }

    #[actix_rt::test]
    async fn s30_a_damaged_block_is_withdrawn_the_snapshots_that_need_it_are_named_and_it_heals() {
        let site = site().await;
        let clean = site.scrub().await;
        assert_eq!((clean.blocks, clean.damaged_blocks, clean.affected), (3, 0, Vec::new()));
        assert!(clean.oldest_ns > 0);
        let place = site.repository.locate(DomainId::FULL, &[id(1)]).await.unwrap()[0].unwrap();
        site.flip(place.offset as usize + 150);
        let found = site.scrub().await;
        assert_eq!((found.damaged_blocks, found.affected.len()), (1, 1), "{found:?}");
        let lease = session(&site.repository, 2, DomainId::FULL).await;
        let ids = vec![id(1), id(2), id(100)];
        assert_eq!(site.repository.known(&lease, ids.clone()).await.unwrap(), [false, true, false]);
        let again = site.scrub().await;
        assert_eq!((again.blocks, again.damaged_blocks, again.withdrawn_before, again.affected.len()), (2, 0, 1, 1));
        // The next backup sends what is not known.
        let store = |sequence, block: Vec<u8>| {
            site.repository.store(&lease, strandline_messages::Sequence(sequence), block.into())
        };
        store(0, data_block(REPOSITORY, &[id(1)])).await.unwrap();
        let outcome = site.repository.commit(&lease, Writer::full().manifest(id(100), "again")).await.unwrap();
        assert!(matches!(outcome, CommitOutcome::Committed { .. }), "{outcome:?}");
        assert_eq!(site.scrub().await.affected, Vec::new(), "both snapshots are whole again");
        // What was withdrawn stays so, over a restart, and is freed with the next collection.
        let Site { dir, engine, repository } = site;
        drop(repository);
        engine.close().await.unwrap();
        let engine = open(dir.path()).await;
        let repository = self::repository(&engine).await;
        let lease = session(&repository, 3, DomainId::FULL).await;
        assert_eq!(repository.known(&lease, ids).await.unwrap(), [true; 3]);
        repository.end_session(&lease, super::super::SessionEnd::Aborted, "").await.unwrap();
        let report = repository.collect_garbage(super::super::gc::GcOptions::default()).await.unwrap();
        assert_eq!(report.blocks_freed, 1, "{report:?}");
    }

    #[actix_rt::test]
    async fn a_scrub_in_parts_reads_every_block_once_before_it_reads_one_again() {
        let site = site().await;
        let mut read = 0;
        for _ in 0..3 {
            let part = site.repository.scrub(ScrubSubset::Bytes { bytes: 1 }, 0).await.unwrap();
            read += part.blocks;
            assert_eq!(part.blocks, 1);
        }
        assert_eq!(read, 3);
        assert!(site.repository.scrub(ScrubSubset::Bytes { bytes: 0 }, 0).await.unwrap().oldest_ns > 0);
        drop(site.engine);
    }
}
