//! The bytes of one file, holes as zeros.

use std::io::Write;

use super::item::{Item, Kind, Spread};
use super::{ExportError, Sink, Taken, put};

pub(super) struct Raw<'a> {
    out: &'a mut dyn Write,
    spread: Option<Spread>,
}

impl<'a> Raw<'a> {
    pub(super) fn new(out: &'a mut dyn Write) -> Self {
        Self { out, spread: None }
    }
}

impl Sink for Raw<'_> {
    const HARD_LINKS: bool = false;

    fn begin(&mut self, item: Item) -> Result<Taken, ExportError> {
        match item.kind {
            Kind::File { size, holes } => {
                self.spread = Some(Spread::new(size, holes));
                Ok(Taken::Yes)
            }
            _ => Ok(Taken::No("it is no file")),
        }
    }

    fn content(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        match &mut self.spread {
            Some(spread) => spread.feed(bytes, |bytes| put(self.out, bytes)),
            None => Ok(()),
        }
    }

    fn end(&mut self) -> Result<(), ExportError> {
        match self.spread.take() {
            Some(spread) => spread.finish(|bytes| put(self.out, bytes)),
            None => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<(), ExportError> {
        Ok(())
    }
}
