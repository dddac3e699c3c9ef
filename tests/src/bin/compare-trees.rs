//! `compare-trees A B`: exit code 0 when both directories hold the same tree, 1 when they differ, 2 when one cannot be
//! read. Differences go to standard output.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use strandline_tests::compare::{Holes, Options, compare};

/// Compares two directory trees exactly: contents, metadata, links, holes.
#[derive(Parser)]
struct Arguments {
    /// The first tree, such as the source of a backup.
    a: PathBuf,
    /// The second tree, such as what was restored.
    b: PathBuf,
    /// Leave owner and group out.
    #[arg(long)]
    ignore_owner: bool,
    /// Leave modification times out.
    #[arg(long)]
    ignore_times: bool,
    /// Leave extended attributes and ACLs out.
    #[arg(long)]
    ignore_xattrs: bool,
    /// Leave holes out.
    #[arg(long, conflicts_with = "same_holes")]
    ignore_holes: bool,
    /// Demand the same holes, where otherwise more holes in B are accepted.
    #[arg(long)]
    same_holes: bool,
    /// Leave the attributes of A and B themselves out.
    #[arg(long)]
    ignore_root: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let options = Options {
        owner: !arguments.ignore_owner,
        times: !arguments.ignore_times,
        xattrs: !arguments.ignore_xattrs,
        holes: match (arguments.ignore_holes, arguments.same_holes) {
            (true, _) => Holes::Ignore,
            (_, true) => Holes::Same,
            _ => Holes::SameOrMore,
        },
        root: !arguments.ignore_root,
    };
    match compare(&arguments.a, &arguments.b, options) {
        Ok(found) => {
            println!("{found}");
            if found.is_same() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("compare-trees: {error:#}");
            ExitCode::from(2)
        }
    }
}
