//! Scrubbing: reading blocks again and comparing their digests, without keys. Those whose last verification is longest ago
//! come first; what is damaged is withdrawn. A pass over a pack that was interrupted goes on where it stopped.

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
    /// are left for the next time.
    pub async fn scrub(&self, subset: ScrubSubset, bytes_per_second: u64) -> Result<ScrubReport, EngineError> {
        let state = &self.state;
        let _one_at_a_time = state.maintaining.lock().await;
        let mut report = ScrubReport::default();
        report.withdrawn_before = state.blocks.read().await.count(|state| state == BlockState::Withdrawn);
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
        let sealed = state.pack_infos().into_iter().filter(|info| info.sealed && mine(info));
        let mut turns: Vec<Turn> = sealed
            .map(|info| {
                let mut row = rows.get(&info.number).copied().unwrap_or_default();
                if row.done_offset >= info.blocks_end {
                    row = VerifiedRow { done_offset: 0, this_ns: 0, last_ns: row.this_ns };
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
        let blocks = {
            let state = Arc::clone(state);
            blocking(move || listed(&state, info)).await?
        };
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

/// The blocks that a sealed pack should have.
fn listed(state: &State, info: PackInfo) -> Result<Vec<FooterEntry>, EngineError> {
    let path = state.paths.pack(info.number);
    let file = File::open(&path).map_err(StorageError::io("open", &path))?;
    Ok(pack_file::contents(&file, &path, info.number, info.domain, state.file.id)?.blocks)
}

/// Reads a block off the disk; what is wrong with it, for people.
fn check(state: &State, pack: u32, entry: FooterEntry) -> Result<Option<String>, EngineError> {
    state.reader.forget_cached(pack, entry.offset, entry.bytes)?;
    match state.reader.read_block(pack, entry.offset, entry.bytes) {
        Ok(block) if block.ends_with(entry.digest.as_bytes()) => Ok(None),
        Ok(_) => {
            Ok(Some(format!("the block at offset {} of pack {pack:08x} is another than its pack lists", entry.offset)))
        }
        Err(error @ StorageError::Damaged { .. }) => Ok(Some(error.to_string())),
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
