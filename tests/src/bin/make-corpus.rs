//! `make-corpus DIR`: makes a nasty tree, or with `--mutate PERCENT` changes one that exists.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use strandline_tests::corpus::Corpus;
use strandline_tests::mutate::mutate;

/// Makes a tree of everything that is hard to back up. The same seed makes the same tree.
#[derive(Parser)]
struct Arguments {
    /// Where; must not exist, unless it is to be changed.
    directory: PathBuf,
    /// Decides every byte, name and time.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many small files, besides about 120 special ones.
    #[arg(long, default_value_t = 1000)]
    files: u64,
    /// Size of each of four big files, MiB.
    #[arg(long, default_value_t = 4)]
    big_mib: usize,
    /// Keep every path shorter than `PATH_MAX`.
    #[arg(long)]
    short_paths: bool,
    /// Change this many of 100 files of the existing tree instead.
    #[arg(long, value_name = "PERCENT")]
    mutate: Option<u64>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(percent) = arguments.mutate {
        let changes = mutate(&arguments.directory, arguments.seed, percent)
            .with_context(|| format!("cannot change {}", arguments.directory.display()))?;
        println!("{changes:?}");
        return Ok(());
    }
    let corpus = Corpus {
        seed: arguments.seed,
        files: arguments.files,
        big_bytes: arguments.big_mib << 20,
        beyond_path_max: !arguments.short_paths,
    };
    corpus.create(&arguments.directory).with_context(|| format!("cannot make {}", arguments.directory.display()))
}
