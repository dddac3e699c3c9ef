//! `strand diff`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use strandline_messages::format::tree::EntryNode;

use super::Fate;
use super::args::Global;
use super::listing;
use super::output;
use super::repository::Opened;
use super::selector::{self, Snapshot};
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::survey::{Change, Changed, Changes, ContentChange, Counts, compare, content_change};
use crate::trees::{Resolved, TreeError, TreeReader};

/// Opened tree blocks kept for each snapshot, bytes.
const CACHE_BYTES: usize = 16 << 20;

/// `strand diff`.
#[derive(Args, Debug)]
pub struct Diff {
    /// The earlier snapshot: an id or its beginning, `latest` or `latest~N`; then optionally `:PATH`
    #[arg(value_name = "BEFORE")]
    before: String,
    /// The later snapshot
    #[arg(value_name = "AFTER")]
    after: String,
    /// Compare only what is there in both
    #[arg(value_name = "PATH")]
    path: Option<OsString>,
    /// Show changed modes, owners, times and extended attributes, too
    #[arg(long)]
    metadata: bool,
    /// Tell how many bytes of each changed file differ, chunk by chunk
    #[arg(long)]
    content: bool,
}

/// One of the two trees.
struct Side {
    snapshot: Snapshot,
    reader: TreeReader,
    /// Without `/` at the ends.
    path: Vec<u8>,
}

impl Side {
    /// `None` if the snapshot has no such path.
    fn resolve(&self) -> anyhow::Result<Option<Resolved>> {
        match self.reader.resolve(self.snapshot.manifest.root, &self.path) {
            Ok(resolved) => Ok(Some(resolved)),
            Err(TreeError::NotFound { .. } | TreeError::NotADirectory { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, diff: Diff) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let compared = compare_two(global, place, &opened, diff).await;
    let closed = opened.server.close().await;
    let changes = compared?;
    closed?;
    Ok(if changes.problems == 0 { Fate::Done } else { Fate::Partial })
}

async fn compare_two(global: &Global, place: &Place, opened: &Opened, diff: Diff) -> anyhow::Result<Changes> {
    let snapshots = selector::all(opened).await?;
    let below = diff.path.as_ref().map(|path| path.as_bytes().to_vec()).unwrap_or_default();
    let named = |text: &str| -> anyhow::Result<_> {
        let (wanted, subpath) = selector::split(text);
        let one = selector::several(&snapshots, &[wanted.to_owned()])?.into_iter().next().cloned();
        Ok((one.context("no such snapshot")?, joined(&subpath, &below)))
    };
    let (before, after) = (named(&diff.before)?, named(&diff.after)?);
    let reading = Reading::open(opened, STREAMS).await?;
    let side = |(snapshot, path): (Snapshot, Vec<u8>)| {
        let reader = TreeReader::new(reading.source(snapshot.id), CACHE_BYTES);
        Side { snapshot, reader, path }
    };
    let (before, after) = (side(before), side(after));
    let printer = Printer {
        json: global.json,
        quiet: global.quiet,
        metadata: diff.metadata,
        content: diff.content.then(|| place.state_dir.clone()),
        unread: 0,
    };
    if diff.content {
        std::fs::create_dir_all(&place.state_dir)?;
    }
    let compared = tokio::task::spawn_blocking(move || printer.run(&before, &after)).await;
    reading.close(opened, "").await;
    compared?
}

fn joined(subpath: &[u8], below: &[u8]) -> Vec<u8> {
    let all = [subpath, below].join(&b'/');
    let names = all.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    names.collect::<Vec<_>>().join(&b'/')
}

struct Printer {
    json: bool,
    quiet: bool,
    metadata: bool,
    /// Compare contents, with temporary files there.
    content: Option<PathBuf>,
    /// Changed files whose lists of chunks could not be read.
    unread: u64,
}

#[derive(Serialize)]
struct Row {
    message_type: &'static str,
    modifier: char,
    path: String,
    #[serde(rename = "type")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_added: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_removed: Option<u64>,
}

#[derive(Serialize)]
struct Statistics {
    message_type: &'static str,
    source_snapshot: String,
    target_snapshot: String,
    changed_files: u64,
    changed_others: u64,
    changed_metadata: u64,
    added: Sum,
    removed: Sum,
    problems: u64,
}

#[derive(Serialize)]
struct Sum {
    files: u64,
    dirs: u64,
    others: u64,
    bytes: u64,
}

impl Printer {
    fn run(mut self, before: &Side, after: &Side) -> anyhow::Result<Changes> {
        let (from, to) = (before.resolve()?, after.resolve()?);
        if from.is_none() && to.is_none() {
            let path = listing::shown(&after.path);
            bail!("neither snapshot has `{path}`; `strand ls` shows what they have");
        }
        if !self.json && !self.quiet {
            let text = format!("{} → {}\n", before.snapshot.id.short(), after.snapshot.id.short());
            output::print(text.as_bytes())?;
        }
        let (old, new) = ((&before.reader, from.as_ref()), (&after.reader, to.as_ref()));
        let mut changes = compare(old, new, &after.path, |found| match found {
            Ok(changed) => self.changed(before, after, &changed),
            Err(problem) => {
                output::error(self.json, Fate::Partial.code(), &format!("{problem}; the rest of it was not compared"));
                if problem.error.is_lost() {
                    bail!("the comparison ended early");
                }
                Ok(())
            }
        })?;
        changes.problems += self.unread;
        self.summary(before, after, &changes)?;
        Ok(changes)
    }

    fn changed(&mut self, before: &Side, after: &Side, changed: &Changed<'_>) -> anyhow::Result<()> {
        let modifier = match changed.change {
            Change::Added => '+',
            Change::Removed => '-',
            Change::Modified => 'M',
            Change::Metadata if !self.metadata => return Ok(()),
            Change::Metadata => 'U',
            Change::Type => 'T',
        };
        let content = self.content_of(before, after, changed)?;
        let entry = changed.after.or(changed.before);
        let mut path = listing::shown(changed.path);
        if self.json {
            return output::json_line(&Row {
                message_type: "change",
                modifier,
                path,
                kind: entry.map(listing::kind),
                content_added: content.map(|content| content.added),
                content_removed: content.map(|content| content.removed),
            });
        }
        if entry.is_some_and(|entry| matches!(entry.entry.node, EntryNode::Directory { .. })) {
            path.push('/');
        }
        let content =
            content.map(|content| format!("  (+{}, -{})", output::size(content.added), output::size(content.removed)));
        output::print(format!("{modifier}    {path}{}\n", content.unwrap_or_default()).as_bytes())
    }

    fn content_of(
        &mut self,
        before: &Side,
        after: &Side,
        changed: &Changed<'_>,
    ) -> anyhow::Result<Option<ContentChange>> {
        let (Change::Modified, Some(directory)) = (changed.change, &self.content) else { return Ok(None) };
        let (Some(old), Some(new)) = (changed.before, changed.after) else { return Ok(None) };
        if !matches!(new.entry.node, EntryNode::File { .. }) {
            return Ok(None);
        }
        match content_change((&before.reader, old), (&after.reader, new), directory.clone()) {
            Ok(content) => Ok(Some(content)),
            Err(crate::survey::ContentError::Tree(error)) if !error.is_lost() => {
                self.unread += 1;
                let text = format!("{}: {error}; its content was not compared", listing::shown(changed.path));
                output::error(self.json, Fate::Partial.code(), &text);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn summary(&self, before: &Side, after: &Side, changes: &Changes) -> anyhow::Result<()> {
        if self.json {
            let sum = |of: fn(&Counts) -> u64, bytes| Sum {
                files: of(&changes.files),
                dirs: of(&changes.directories),
                others: of(&changes.others),
                bytes,
            };
            return output::json_line(&Statistics {
                message_type: "statistics",
                source_snapshot: before.snapshot.id.to_string(),
                target_snapshot: after.snapshot.id.to_string(),
                changed_files: changes.files.changed,
                changed_others: changes.others.changed,
                changed_metadata: changes.metadata,
                added: sum(|counts| counts.added, changes.bytes_added),
                removed: sum(|counts| counts.removed, changes.bytes_removed),
                problems: changes.problems,
            });
        }
        if self.quiet {
            return Ok(());
        }
        output::print(self.text(changes).as_bytes())
    }

    fn text(&self, changes: &Changes) -> String {
        let row = |name: &str, counts: &Counts| {
            format!("{name:<10}{} new, {} removed, {} changed\n", counts.added, counts.removed, counts.changed)
        };
        let hint = if self.metadata || changes.metadata == 0 { "" } else { " (shown with --metadata)" };
        format!(
            "\n{}{}{}{:<10}{} changed{hint}\n{:<10}{}\n{:<10}{}\n",
            row("Files:", &changes.files),
            row("Dirs:", &changes.directories),
            row("Others:", &changes.others),
            "Metadata:",
            changes.metadata,
            "Added:",
            output::size(changes.bytes_added),
            "Removed:",
            output::size(changes.bytes_removed),
        )
    }
}
