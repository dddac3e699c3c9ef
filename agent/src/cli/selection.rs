//! What a backup leaves out: options of the command line, and the settings' defaults of them.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::args;
use super::lists;
use super::settings::Settings;
use crate::backup::BackupPlan;
use crate::scan::markers::Marker;

/// Options that choose. Nothing that is named as a path itself is left out by them.
#[derive(Args, Debug, Default)]
pub struct Selection {
    /// Leave out what matches (`*.tmp`, `/var/cache`, `**/node_modules`); `!` includes again; may be repeated
    #[arg(short, long, value_name = "PATTERN")]
    pub exclude: Vec<String>,
    /// Leave out what the patterns in this file match, one on each line; `#` begins a comment; may be repeated
    #[arg(long, value_name = "FILE")]
    pub exclude_file: Vec<PathBuf>,
    /// As --exclude, without regard to upper and lower case
    #[arg(long, value_name = "PATTERN")]
    pub iexclude: Vec<String>,
    /// As --exclude-file, without regard to upper and lower case
    #[arg(long, value_name = "FILE")]
    pub iexclude_file: Vec<PathBuf>,
    /// Leave out what is in directories that hold a file NAME (which begins with HEADER), except that file
    #[arg(long, value_name = "NAME[:HEADER]")]
    pub exclude_if_present: Vec<String>,
    /// Leave out what is in directories that are marked as caches by a CACHEDIR.TAG
    #[arg(long)]
    pub exclude_caches: bool,
    /// Leave out files that are longer (`10M`)
    #[arg(long, value_name = "SIZE")]
    pub exclude_larger_than: Option<String>,
    /// In each directory, leave out what a file of this name there says in the manner of .gitignore (`.strandignore`)
    #[arg(long, value_name = "NAME")]
    pub exclude_per_directory: Option<String>,
    /// Stay on the file systems of the given paths
    #[arg(short = 'x', long)]
    pub one_file_system: bool,
}

impl Selection {
    /// Puts the settings and these options into the plan. Of patterns the last that matches decides; files of patterns come
    /// before patterns, settings before the command line, those without regard to case last.
    pub fn apply(&self, settings: &Settings, plan: &mut BackupPlan) -> anyhow::Result<()> {
        plan.excludes =
            all_patterns([(&settings.exclude_file, &settings.exclude), (&self.exclude_file, &self.exclude)])?;
        plan.iexcludes =
            all_patterns([(&settings.iexclude_file, &settings.iexclude), (&self.iexclude_file, &self.iexclude)])?;
        for text in settings.exclude_if_present.iter().chain(&self.exclude_if_present) {
            let marker = Marker::parse(text)
                .with_context(|| format!("`{text}` is not NAME[:HEADER] with the name of a file; nothing was saved"))?;
            plan.markers.push(marker);
        }
        if self.exclude_caches || settings.exclude_caches {
            plan.markers.extend(Marker::of_caches());
        }
        let larger_than = self.exclude_larger_than.as_ref().or(settings.exclude_larger_than.as_ref());
        plan.larger_than = larger_than.map(|text| args::bytes(text).map_err(anyhow::Error::msg)).transpose()?;
        let ignore_file = self.exclude_per_directory.as_ref().or(settings.exclude_per_directory.as_ref());
        if let Some(name) = ignore_file {
            anyhow::ensure!(
                Marker::parse(name).is_some() && !name.contains(':'),
                "`{name}` is not the name of a file; nothing was saved"
            );
            plan.ignore_file = Some(name.clone().into_bytes());
        }
        plan.one_file_system = self.one_file_system || settings.one_file_system;
        Ok(())
    }
}

fn all_patterns(sources: [(&Vec<PathBuf>, &Vec<String>); 2]) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    for (files, patterns) in sources {
        for file in files {
            all.extend(lists::patterns(file)?);
        }
        all.extend(patterns.iter().cloned());
    }
    Ok(all)
}
