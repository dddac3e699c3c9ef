//! `strand find`.

use std::sync::Arc;

use clap::{Args, ValueEnum};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, civil};
use serde::Serialize;
use strandline_actors::runtime::clock;

use super::Fate;
use super::args::{self, Global};
use super::choice;
use super::filter::Filter;
use super::listing::{self, Line};
use super::output;
use super::repository::Opened;
use super::selector::Snapshot;
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::survey::{EntryType, Found, Pattern, Prefix, Query, Search, SizeTest};
use crate::trees::ChunkSource;

/// `strand find`.
#[derive(Args, Debug)]
pub struct Find {
    /// What to find: matched with the name, or with the whole path if it contains `/` (`*.jpg`, `/home/*/mail`, `src/**/*.rs`)
    #[arg(
        value_name = "PATTERN",
        required_unless_present_any = ["types", "size", "newer_than", "older_than", "chunk"]
    )]
    patterns: Vec<String>,
    /// Capital and small letters are the same
    #[arg(short, long)]
    ignore_case: bool,
    /// Only this type; may be repeated or separated by commas
    #[arg(long = "type", value_enum, value_name = "TYPE", value_delimiter = ',')]
    types: Vec<Type>,
    /// Only files larger (`+10M`) or smaller (`-1K`) than this many bytes, or exactly so large (`4096`)
    #[arg(long, value_name = "SIZE", value_parser = size_test, allow_hyphen_values = true)]
    size: Option<SizeTest>,
    /// Only what was modified after this (`2026-01-31`, `2026-01-31T18:30:00`, `2026-01-31T18:30:00Z`, or `7d` ago)
    #[arg(long, value_name = "TIME", value_parser = moment)]
    newer_than: Option<i64>,
    /// Only what was modified before this
    #[arg(long, value_name = "TIME", value_parser = moment)]
    older_than: Option<i64>,
    /// Only files whose content uses this chunk (an id or its beginning), and directories that are this tree chunk
    #[arg(long, value_name = "ID", value_parser = prefix)]
    chunk: Option<Prefix>,
    /// Look only into this snapshot; may be repeated [default: all]
    #[arg(short, long, value_name = "ID")]
    snapshot: Vec<String>,
    #[command(flatten)]
    filter: Filter,
    /// Mode, owner, size and time, too
    #[arg(short, long)]
    long: bool,
    /// With -l: sizes with units
    #[arg(long)]
    human_readable: bool,
}

/// `--type`, in the letters of find(1).
#[derive(ValueEnum, Clone, Copy, Debug)]
enum Type {
    /// Regular file
    #[value(name = "f")]
    File,
    /// Directory
    #[value(name = "d")]
    Directory,
    /// Symbolic link
    #[value(name = "l")]
    Symlink,
    /// Named pipe
    #[value(name = "p")]
    Fifo,
    /// Socket
    #[value(name = "s")]
    Socket,
    /// Character device
    #[value(name = "c")]
    CharDevice,
    /// Block device
    #[value(name = "b")]
    BlockDevice,
}

impl From<Type> for EntryType {
    fn from(kind: Type) -> Self {
        match kind {
            Type::File => Self::File,
            Type::Directory => Self::Directory,
            Type::Symlink => Self::Symlink,
            Type::Fifo => Self::Fifo,
            Type::Socket => Self::Socket,
            Type::CharDevice => Self::CharDevice,
            Type::BlockDevice => Self::BlockDevice,
        }
    }
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, find: Find) -> anyhow::Result<Fate> {
    let query = Query {
        pattern: match find.patterns.as_slice() {
            [] => None,
            patterns => Some(Pattern::new(patterns, find.ignore_case)?),
        },
        types: find.types.iter().map(|kind| EntryType::from(*kind)).collect(),
        size: find.size,
        newer_ns: find.newer_than,
        older_ns: find.older_than,
        chunk: find.chunk.clone(),
    };
    let opened = Opened::existing(global, place).await?;
    let searched = search(global, &opened, &find, query).await;
    let closed = opened.server.close().await;
    let problems = searched?;
    closed?;
    Ok(if problems == 0 { Fate::Done } else { Fate::Partial })
}

async fn search(global: &Global, opened: &Opened, find: &Find, query: Query) -> anyhow::Result<u64> {
    let snapshots = choice::chosen(opened, &find.filter, &find.snapshot).await?;
    let reading = Reading::open(opened, STREAMS).await?;
    let snapshots: Vec<_> = snapshots.into_iter().map(|snapshot| (reading.source(snapshot.id), snapshot)).collect();
    let mut printer =
        Printer { json: global.json, long: find.long, human: find.human_readable, groups: 0, problems: 0 };
    let searching = tokio::task::spawn_blocking(move || {
        let mut search = Search::new(query);
        for (source, snapshot) in snapshots {
            printer.snapshot(&mut search, source, &snapshot)?;
        }
        Ok(printer.problems)
    });
    let searched = searching.await;
    reading.close(opened, "").await;
    searched?
}

/// Prints what is found, a group for each snapshot.
struct Printer {
    json: bool,
    long: bool,
    human: bool,
    groups: u64,
    problems: u64,
}

#[derive(Serialize)]
struct Row {
    snapshot: String,
    #[serde(flatten)]
    line: Line,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_offset: Option<u64>,
}

impl Printer {
    fn snapshot(
        &mut self,
        search: &mut Search,
        source: Arc<dyn ChunkSource>,
        snapshot: &Snapshot,
    ) -> anyhow::Result<()> {
        let mut first = true;
        search.snapshot(source, snapshot.manifest.root, |found| match found {
            Ok(found) if self.json => output::json_line(&Row {
                snapshot: snapshot.id.to_string(),
                line: Line::new(found.path, found.entry),
                chunk: found.chunk.map(|(id, _)| id.to_string()),
                chunk_offset: found.chunk.map(|(_, offset)| offset),
            }),
            Ok(found) => {
                if std::mem::take(&mut first) {
                    self.head(snapshot)?;
                }
                output::print(self.text(&found).as_bytes())
            }
            Err(problem) => {
                self.problems += 1;
                let text = format!("snapshot {}, {problem}", snapshot.id.short());
                output::error(self.json, Fate::Partial.code(), &text);
                if problem.error.is_lost() { Err(anyhow::anyhow!("the search ended early")) } else { Ok(()) }
            }
        })
    }

    fn head(&mut self, snapshot: &Snapshot) -> anyhow::Result<()> {
        let between = if self.groups > 0 { "\n" } else { "" };
        self.groups += 1;
        let time = output::moment(snapshot.manifest.started_ns);
        let text = format!("{between}snapshot {} of {}, {time}\n", snapshot.id.short(), snapshot.manifest.host);
        output::print(text.as_bytes())
    }

    fn text(&self, found: &Found<'_>) -> String {
        let line = if self.long {
            listing::long(found.path, found.entry, self.human)
        } else {
            format!("{}\n", listing::shown(found.path))
        };
        match found.chunk {
            Some((id, offset)) => format!("{}  (chunk {id} at {offset})\n", line.trim_end()),
            None => line,
        }
    }
}

fn prefix(text: &str) -> Result<Prefix, String> {
    Prefix::parse(text).ok_or_else(|| "give 1 to 64 hexadecimal digits of a chunk's id".to_owned())
}

fn size_test(text: &str) -> Result<SizeTest, String> {
    let bytes = |text: &str| if text == "0" { Ok(0) } else { args::bytes(text) };
    match text.split_at_checked(1) {
        Some(("+", rest)) => bytes(rest).map(SizeTest::More),
        Some(("-", rest)) => bytes(rest).map(SizeTest::Less),
        _ => bytes(text).map(SizeTest::Exactly),
    }
}

/// A moment in ns since 1970: with an offset, in this machine's time zone, or so long ago.
fn moment(text: &str) -> Result<i64, String> {
    let zone = TimeZone::system();
    let far = || format!("`{text}` is too far away");
    let time = if let Ok(time) = text.parse::<Timestamp>() {
        time
    } else if let Ok(time) = text.parse::<civil::DateTime>() {
        time.to_zoned(zone).map_err(|_| far())?.timestamp()
    } else if let Ok(span) = text.parse::<Span>() {
        let now = Timestamp::from_nanosecond(clock::wall_ns().into()).map_err(|_| far())?;
        now.to_zoned(zone).checked_sub(span).map_err(|_| far())?.timestamp()
    } else {
        return Err(format!("`{text}` is neither a time such as 2026-01-31 nor a span such as 7d or 36h"));
    };
    i64::try_from(time.as_nanosecond()).map_err(|_| far())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_direction() {
        assert_eq!(size_test("+10M"), Ok(SizeTest::More(10 << 20)));
        assert_eq!(size_test("-1K"), Ok(SizeTest::Less(1024)));
        assert_eq!(size_test("0"), Ok(SizeTest::Exactly(0)));
        assert_eq!(size_test("+0"), Ok(SizeTest::More(0)));
        for bad in ["", "+", "-x", "10x", "--1"] {
            assert!(size_test(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_moment_is_a_time_or_a_span_ago() {
        assert_eq!(moment("1970-01-01T00:00:01Z"), Ok(1_000_000_000));
        assert_eq!(moment("1970-01-01T01:00:01+01:00"), Ok(1_000_000_000));
        let day = moment("2026-01-02").unwrap() - moment("2026-01-01").unwrap();
        assert_eq!(day, 86_400_000_000_000);
        assert!(moment("2026-01-01T12:00:00").unwrap() > moment("2026-01-01").unwrap());
        let ago = clock::wall_ns() - moment("36h").unwrap();
        assert!((ago - 36 * 3_600_000_000_000).abs() < 60_000_000_000, "{ago}");
        assert!(moment("7d").unwrap() < moment("6d").unwrap());
        for bad in ["", "yesterday", "2026-13-01", "99999y"] {
            assert!(moment(bad).is_err(), "{bad}");
        }
    }
}
