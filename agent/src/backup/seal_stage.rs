//! A sealing thread's life: full blocks in, sealed ones to the sink, as hard compressed as it has time for.

use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};
use rustix::time::{ClockId, clock_gettime};
use strandline_actors::runtime::clock;

use super::BackupError;
use super::blocks::OpenBlock;
use super::ports::{BlockSealer, BlockSink};
use super::progress::Progress;
use super::run::Fault;
use crate::seal::{Compression, LevelControl, Sealing};

/// What the sealing threads share.
pub struct SealStage<'a> {
    pub sink: &'a dyn BlockSink,
    pub progress: &'a Progress,
    pub fault: &'a Fault<'a>,
    pub compression: Compression,
}

impl SealStage<'_> {
    /// Seals `blocks` until there are no more, and gives them back empty.
    pub fn run(
        &self,
        mut sealer: Box<dyn BlockSealer>,
        blocks: &Receiver<OpenBlock>,
        emptied: &Sender<OpenBlock>,
    ) -> Result<(), BackupError> {
        let mut levels = LevelControl::new(self.compression);
        let mut idle_since = clock::now();
        for mut block in blocks {
            self.fault.check()?;
            let permit = self.sink.reserve(block.sealed_bytes_max())?;
            // A block is never too long for this.
            let bytes = u32::try_from(block.body.content_bytes()).unwrap_or(u32::MAX);
            let began = clock::now();
            sealer.set_level(levels.next(bytes, began.saturating_duration_since(idle_since)))?;
            let processor = processor_time();
            let sealed = sealer.seal(block.kind, &block.rows, &mut block.body)?;
            idle_since = clock::now();
            levels.sealed(Sealing {
                elapsed: idle_since.saturating_duration_since(began),
                processor: processor_time().saturating_sub(processor),
                bytes,
                codec: sealed.codec,
            });
            self.progress.blocks.add(1);
            self.progress.bytes_stored.add(sealed.bytes.len() as u64);
            self.sink.send(permit, Bytes::from_owner(sealed.bytes))?;
            block.clear();
            // A full channel means that enough empty blocks are waiting.
            drop(emptied.try_send(block));
        }
        Ok(())
    }
}

/// How long this thread has had a processor.
fn processor_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}
