//! What the actors complain of on this thread: a world in which nothing goes wrong must be silent.

use std::sync::Arc;

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Level, Metadata, Subscriber};

/// Hears warnings and errors as long as it lives.
pub struct Alarm {
    heard: Arc<Mutex<Vec<String>>>,
    _guard: DefaultGuard,
}

impl Alarm {
    /// Begins to listen on this thread.
    pub fn listen() -> Self {
        let heard: Arc<Mutex<Vec<String>>> = Arc::default();
        let guard = tracing::subscriber::set_default(Ear { heard: Arc::clone(&heard) });
        Self { heard, _guard: guard }
    }

    /// What was heard, in order.
    pub fn heard(&self) -> Vec<String> {
        self.heard.lock().clone()
    }
}

struct Ear {
    heard: Arc<Mutex<Vec<String>>>,
}

#[derive(Default)]
struct Words(String);

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.push_str(&format!("{field}={value:?} "));
    }
}

impl Subscriber for Ear {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN && metadata.is_event()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn event(&self, event: &Event<'_>) {
        let mut words = Words::default();
        event.record(&mut words);
        self.heard.lock().push(words.0);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}
