//! `strand ls`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use clap::Args;
use serde::Serialize;
use strandline_messages::ChunkId;

use super::Fate;
use super::args::Global;
use super::listing::{self, Line};
use super::output;
use super::repository::Opened;
use super::selector;
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::trees::{DirEntry, Resolved, Step, TreeReader};

/// Opened tree blocks kept, bytes.
const CACHE_BYTES: usize = 32 << 20;

/// `strand ls`.
#[derive(Args, Debug)]
pub struct Ls {
    /// An id or its beginning, `latest` or `latest~N`; then optionally `:PATH`
    snapshot: String,
    /// List only these: files, and what stands directly in directories [default: everything]
    #[arg(value_name = "PATH")]
    paths: Vec<OsString>,
    /// With PATH: everything below directories
    #[arg(long)]
    recursive: bool,
    /// Mode, owner, size and time, too
    #[arg(short, long)]
    long: bool,
    /// With -l: sizes with units
    #[arg(long)]
    human_readable: bool,
    /// List what could not be saved as it was, and why
    #[arg(long, conflicts_with_all = ["paths", "recursive", "long", "human_readable"])]
    errors: bool,
}

/// How entries are printed.
#[derive(Clone, Copy)]
struct Style {
    json: bool,
    long: bool,
    human: bool,
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, ls: &Ls) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let listed = list(global, &opened, ls).await;
    let closed = opened.server.close().await;
    let problems = listed?;
    closed?;
    Ok(if problems == 0 { Fate::Done } else { Fate::Partial })
}

async fn list(global: &Global, opened: &Opened, ls: &Ls) -> anyhow::Result<u64> {
    let (wanted, subpath) = selector::split(&ls.snapshot);
    let snapshot = selector::one(opened, wanted).await?;
    let reading = Reading::open(opened, STREAMS).await?;
    let reader = TreeReader::new(reading.source(snapshot.id), CACHE_BYTES);
    let style = Style { json: global.json, long: ls.long, human: ls.human_readable };
    let (paths, recursive) = (paths(&subpath, &ls.paths), ls.recursive || ls.paths.is_empty());
    let (errors, quiet) = (ls.errors, global.quiet);
    let root = snapshot.manifest.root;
    let walking = tokio::task::spawn_blocking(move || match (errors, snapshot.manifest.errors) {
        (true, Some(top)) => print_errors(&reader, top, style),
        (true, None) if style.json || quiet => Ok(0),
        (true, None) => output::print(b"everything was saved\n").map(|()| 0),
        (false, _) => paths.iter().try_fold(0, |sum, path| Ok(sum + walk(&reader, root, path, recursive, style)?)),
    });
    let walked = walking.await;
    reading.close(opened, "").await;
    walked?
}

/// The paths to list, sorted, without leading `/`.
fn paths(subpath: &[u8], wanted: &[OsString]) -> Vec<Vec<u8>> {
    if wanted.is_empty() {
        return vec![subpath.to_vec()];
    }
    let below = |path: &OsString| {
        let all = [subpath, path.as_bytes()].join(&b'/');
        let names = all.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
        names.collect::<Vec<_>>().join(&b'/')
    };
    let mut paths: Vec<_> = wanted.iter().map(below).collect();
    paths.sort_unstable();
    paths.dedup();
    paths
}

/// Prints what is at `path`, and below it; returns how many parts of the tree could not be read.
fn walk(reader: &TreeReader, root: ChunkId, path: &[u8], recursive: bool, style: Style) -> anyhow::Result<u64> {
    let (top, prefix) = match reader.resolve(root, path)? {
        Resolved::Root(top) => (top, Vec::new()),
        Resolved::Entry(entry) => {
            print(path, &entry, style)?;
            match entry.directory_top()? {
                Some(top) => (top, path.to_vec()),
                None => return Ok(0),
            }
        }
    };
    let mut problems = 0;
    let mut walk = reader.walk(top, &prefix);
    while let Some(step) = walk.next() {
        match step {
            Ok((path, Step::Enter(entry))) => {
                print(&path, &entry, style)?;
                if !recursive {
                    walk.skip_directory();
                }
            }
            Ok((path, Step::Entry(entry))) => print(&path, &entry, style)?,
            Ok((_, Step::Leave)) => {}
            Err(error) => {
                problems += 1;
                output::error(style.json, Fate::Partial.code(), &error.to_string());
            }
        }
    }
    Ok(problems)
}

fn print(path: &[u8], entry: &DirEntry, style: Style) -> anyhow::Result<()> {
    match style {
        Style { json: true, .. } => output::json_line(&Line::new(path, entry)),
        Style { long: true, human, .. } => output::print(listing::long(path, entry, human).as_bytes()),
        _ => output::print(format!("{}\n", listing::shown(path)).as_bytes()),
    }
}

#[derive(Serialize)]
struct Unsaved {
    path: String,
    message: String,
}

/// Prints the error list; returns how many parts of it could not be read.
fn print_errors(reader: &TreeReader, top: ChunkId, style: Style) -> anyhow::Result<u64> {
    let mut problems = 0;
    for error in reader.source_errors(top) {
        match error {
            Ok(error) => {
                let unsaved = Unsaved { path: output::path(&error.path), message: error.message };
                if style.json {
                    output::json_line(&unsaved)?;
                } else {
                    output::print(format!("{}: {}\n", unsaved.path, unsaved.message).as_bytes())?;
                }
            }
            Err(error) => {
                problems += 1;
                output::error(style.json, Fate::Partial.code(), &format!("the list of errors: {error}"));
            }
        }
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_sorted_and_stand_below_the_subpath() {
        let given = |paths: &[&str]| paths.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(paths(b"a/b", &[]), [b"a/b".to_vec()]);
        assert_eq!(paths(b"", &given(&["/z//y/", "./x", "x"])), [b"x".to_vec(), b"z/y".to_vec()]);
        assert_eq!(paths(b"a", &given(&["/x", "/"])), [b"a".to_vec(), b"a/x".to_vec()]);
    }
}
