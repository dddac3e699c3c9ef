//! The live line on a terminal, and the status lines of `--json`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use strandline_actors::runtime::clock;

use super::args::Global;
use super::output;

/// How often a terminal's line is drawn, and a JSON line printed.
const LIVE: Duration = Duration::from_millis(200);
const JSON: Duration = Duration::from_secs(1);

/// What a running command says of itself.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Snapshot {
    /// Files and other entries done.
    pub files_done: u64,
    /// Of so many, as far as known.
    pub files_total: u64,
    /// Bytes done.
    pub bytes_done: u64,
    /// Of so many, as far as known.
    pub bytes_total: u64,
    /// Whether the totals are final.
    pub totals_final: bool,
    /// Bytes that the repository did not have.
    pub bytes_new: u64,
    /// Streams live.
    pub streams: u64,
    /// Errors so far.
    pub errors: u64,
    /// What is being worked on.
    pub current: String,
}

/// Shows progress until dropped.
pub struct Display {
    shown: Shown,
    started: Instant,
}

enum Shown {
    Nothing,
    Json,
    Line(ProgressBar),
}

#[derive(Serialize)]
struct StatusLine<'a> {
    message_type: &'static str,
    seconds_elapsed: u64,
    seconds_remaining: Option<u64>,
    #[serde(flatten)]
    now: &'a Snapshot,
}

/// Whether anybody is shown the progress.
pub fn is_watched(global: &Global) -> bool {
    !global.quiet && (global.json || !ProgressDrawTarget::stderr().is_hidden())
}

impl Display {
    /// A line if standard error is a terminal, JSON lines with `--json`, else nothing.
    pub fn new(global: &Global) -> Self {
        let shown = if !is_watched(global) {
            Shown::Nothing
        } else if global.json {
            Shown::Json
        } else {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{wide_msg}") {
                bar.set_style(style);
            }
            Shown::Line(bar)
        };
        Self { shown, started: clock::now() }
    }

    /// Draws `look`'s view again and again; ends only by being dropped.
    pub async fn follow(&self, look: impl Fn() -> Snapshot) {
        let every = match self.shown {
            Shown::Nothing => return std::future::pending().await,
            Shown::Json => JSON,
            Shown::Line(_) => LIVE,
        };
        loop {
            tokio::time::sleep(every).await;
            self.draw(&look());
        }
    }

    fn draw(&self, now: &Snapshot) {
        let elapsed = clock::now().saturating_duration_since(self.started);
        let remaining = remaining(now, elapsed);
        match &self.shown {
            Shown::Nothing => {}
            Shown::Json => {
                let line = StatusLine {
                    message_type: "status",
                    seconds_elapsed: elapsed.as_secs(),
                    seconds_remaining: remaining.map(|left| left.as_secs()),
                    now,
                };
                // A reader that is gone is noticed at the summary.
                let _ = output::json_line(&line);
            }
            Shown::Line(bar) => bar.set_message(line(now, elapsed, remaining)),
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Shown::Line(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

/// What is left, from the mean rate so far and totals that a scan running ahead has found.
fn remaining(now: &Snapshot, elapsed: Duration) -> Option<Duration> {
    let left = now.bytes_total.checked_sub(now.bytes_done)?;
    if !now.totals_final || now.bytes_done == 0 || elapsed < Duration::from_secs(1) {
        return None;
    }
    let millis = elapsed.as_millis() * u128::from(left) / u128::from(now.bytes_done);
    Some(Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)))
}

fn line(now: &Snapshot, elapsed: Duration, remaining: Option<Duration>) -> String {
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = now.bytes_done.saturating_mul(1000) / millis;
    let approximately = if now.totals_final { "" } else { "+" };
    let mut parts = vec![
        format!("{} of {}{approximately}", output::size(now.bytes_done), output::size(now.bytes_total)),
        format!("{} of {}{approximately} files", now.files_done, now.files_total),
        format!("{}/s", output::size(rate)),
    ];
    if let Some(left) = remaining {
        parts.push(format!("{} left", output::span(left)));
    }
    if now.bytes_done > 0 && now.bytes_new > 0 {
        let known = now.bytes_done.saturating_sub(now.bytes_new).saturating_mul(100) / now.bytes_done;
        parts.push(format!("{known} % known"));
    }
    if now.streams > 0 {
        parts.push(format!("{} streams", now.streams));
    }
    if now.errors > 0 {
        parts.push(format!("{} errors", now.errors));
    }
    if !now.current.is_empty() {
        parts.push(now.current.clone());
    }
    parts.join(" · ")
}

/// Runs `work` while its progress is shown.
pub async fn shown<T>(global: &Global, look: Arc<dyn Fn() -> Snapshot>, work: impl Future<Output = T>) -> T {
    let display = Display::new(global);
    tokio::select! {
        done = work => done,
        () = display.follow(|| look()) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_told_only_when_the_total_is_known() {
        let mut now = Snapshot { bytes_done: 50, bytes_total: 200, ..Snapshot::default() };
        assert_eq!(remaining(&now, Duration::from_secs(10)), None);
        now.totals_final = true;
        assert_eq!(remaining(&now, Duration::from_secs(10)), Some(Duration::from_secs(30)));
    }
}
