//! `strand-server repair`: looks at every pack, gives those a footer that have none that can be trusted, makes the index anew,
//! reads every block, and tells which snapshots cannot be restored completely.
//!
//! Nothing is ever truncated or overwritten: a footer is appended, a pack that nobody can attribute is set aside by its name.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use strandline_messages::format::block::BlockView;
use strandline_messages::format::pack::{FooterEntry, PACK_HEADER_BYTES};
use strandline_messages::wire::manage::ScrubSubset;
use strandline_messages::{DomainId, RepositoryId, limits};

use super::{Found, find, remove_index};
use crate::admin::values::RepositoryPath;
use crate::catalog::Catalog;
use crate::cli::Refused;
use crate::engine::upkeep::ScrubSummary;
use crate::engine::{Engine, EngineOptions, Repository};
use crate::storage::files::SystemFiles;
use crate::storage::layout::{DataPaths, RepositoryPaths, pack_number};
use crate::storage::lock::DirectoryLock;
use crate::storage::pack_file::{self, PackInfo};
use crate::storage::pack_reader::PackReader;
use crate::storage::{StorageError, pack_state};

/// What a repair found and did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Repaired {
    /// Only looked.
    pub dry_run: bool,
    /// The repositories that were looked at.
    pub repositories: Vec<RepairedRepository>,
}

/// What was found in one repository.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RepairedRepository {
    /// `TENANT/NAME`, or its directory if its file cannot be read.
    pub repository: String,
    /// Packs that were looked at.
    pub packs: u64,
    /// What is not as it should be, by pack.
    pub findings: Vec<Finding>,
    /// Blocks that are damaged now; with `dry_run` found without withdrawing them.
    pub damaged_blocks: u64,
    /// Which, for people; at most `limits::DAMAGE_ROWS_MAX`.
    pub damaged: Vec<String>,
    /// Ids of snapshots that cannot be restored completely, at most `limits::DAMAGE_ROWS_MAX`; none with `dry_run`, because
    /// telling needs the index that only a repair makes anew.
    pub affected: Option<Vec<String>>,
    /// What kept the repository from being repaired, for people.
    pub error: Option<String>,
}

/// What is not as it should be about a pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The pack's file name without its ending.
    pub pack: String,
    /// What it is.
    pub kind: FindingKind,
    /// The same for people, and what was done about it.
    pub text: String,
}

/// What may be wrong with a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// There was no footer that can be trusted.
    Footer,
    /// The header is not this pack's, but the catalog knows whose it is.
    Header,
    /// A crash left it before anything was in it.
    Empty,
    /// The header is not this pack's, and nobody knows whose it is: it is set aside.
    Unattributable,
    /// It was set aside earlier.
    SetAside,
    /// The catalog knows of it, and there is no file.
    Missing,
    /// The disk does not give its bytes.
    Unreadable,
}

impl FindingKind {
    /// Whether backed-up data may be lost by it.
    fn is_loss(self) -> bool {
        !matches!(self, Self::Footer | Self::Header | Self::Empty)
    }
}

impl RepairedRepository {
    /// Whether something is wrong that a repair cannot make good.
    pub fn is_damaged(&self) -> bool {
        self.error.is_some()
            || self.damaged_blocks > 0
            || self.affected.as_ref().is_some_and(|affected| !affected.is_empty())
            || self.findings.iter().any(|finding| finding.kind.is_loss())
    }
}

/// Repairs one repository of `data`, or all.
pub async fn repair(
    data: &Path,
    only: Option<&RepositoryPath>,
    dry_run: bool,
    lock_wait: Duration,
) -> anyhow::Result<Repaired> {
    let paths = DataPaths::new(data);
    let lock = DirectoryLock::take(data, &paths.lock(), lock_wait)?;
    let mut found = find(&paths)?;
    found.retain(|found| match (only, &found.file) {
        (None, _) => true,
        (Some(path), Ok(file)) => path.tenant == found.tenant && path.name == file.name,
        (Some(_), Err(_)) => false,
    });
    if let (Some(path), true) = (only, found.is_empty()) {
        return Err(Refused::no_repository(path).into());
    }
    let mut repaired = Repaired { dry_run, ..Repaired::default() };
    let mut rows = known_packs(&paths).await;
    for found in &found {
        let rows = rows.remove(found.paths.root()).unwrap_or_default();
        repaired.repositories.push(look(found, &rows, dry_run)?);
    }
    if dry_run {
        return Ok(repaired);
    }
    for found in &found {
        remove_index(&found.paths)?;
    }
    let engine = Engine::open_locked(data, lock, EngineOptions::default()).await?;
    for (found, report) in found.iter().zip(&mut repaired.repositories) {
        let Ok(file) = &found.file else { continue };
        match engine.repository(&found.tenant, &file.name).await {
            Ok(repository) => read_everything(&repository, report).await,
            Err(error) => report.error = Some(error.to_string()),
        }
    }
    engine.close().await?;
    Ok(repaired)
}

type Rows = HashMap<u32, PackInfo>;

/// What the catalog knows of packs, by the directory of their repository. A catalog that cannot be read knows nothing.
async fn known_packs(paths: &DataPaths) -> BTreeMap<PathBuf, Rows> {
    let mut known = BTreeMap::new();
    if !paths.catalog().exists() {
        return known;
    }
    let read = async {
        let catalog = Catalog::open(&paths.catalog()).await?;
        for row in catalog.repositories().await? {
            let home = paths.repository(&row.tenant, &row.id).root().to_path_buf();
            known.insert(home, catalog.packs(row.number).await?);
        }
        catalog.close().await
    };
    if let Err(error) = read.await {
        tracing::warn!(%error, "the catalog cannot be read: packs that are missing cannot be told");
    }
    known
}

/// Looks at the packs of a repository, without the engine.
fn look(found: &Found, rows: &Rows, dry_run: bool) -> anyhow::Result<RepairedRepository> {
    let file = match &found.file {
        Ok(file) => file,
        Err(error) => {
            let error = format!(
                "its repository file cannot be used ({error}); nothing of it was looked at; a damaged one can be restored from a copy"
            );
            let repository = found.paths.root().display().to_string();
            return Ok(RepairedRepository { repository, error: Some(error), ..RepairedRepository::default() });
        }
    };
    let repository = format!("{}/{}", found.tenant, file.name);
    let mut report = RepairedRepository { repository, ..RepairedRepository::default() };
    let (numbers, set_aside) = list(&found.paths)?;
    for number in set_aside {
        let text = "was set aside earlier: nobody knows whose blocks are in it; it is not read";
        report.findings.push(finding(number, FindingKind::SetAside, text.to_owned()));
    }
    for &number in &numbers {
        report.packs += 1;
        let looking = Looking { paths: &found.paths, id: file.id, number, row: rows.get(&number), dry_run };
        looking.look(&mut report)?;
    }
    let mut missing: Vec<&PackInfo> = rows.values().filter(|row| !numbers.contains(&row.number)).collect();
    missing.sort_by_key(|row| row.number);
    for row in missing {
        let text = format!(
            "is missing: {} blocks, {} bytes; bring the file back from a copy and repair again, or back up again what needs it",
            row.blocks, row.file_bytes
        );
        report.findings.push(finding(row.number, FindingKind::Missing, text));
    }
    Ok(report)
}

fn finding(number: u32, kind: FindingKind, text: String) -> Finding {
    Finding { pack: format!("{number:08x}"), kind, text }
}

/// The numbers of the packs, and of those that were set aside.
fn list(paths: &RepositoryPaths) -> anyhow::Result<(Vec<u32>, Vec<u32>)> {
    let directory = paths.packs();
    let cannot = || format!("cannot list {}", directory.display());
    let (mut packs, mut aside) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(&directory).with_context(cannot)? {
        let name = entry.with_context(cannot)?.file_name();
        match name.to_str().and_then(pack_number) {
            Some((number, "pack")) => packs.push(number),
            // With less in it than a header a crash left it, and nothing is lost.
            Some((number, "damaged"))
                if fs::metadata(paths.damaged_pack(number)).with_context(cannot)?.len() > PACK_HEADER_BYTES as u64 =>
            {
                aside.push(number);
            }
            _ => {}
        }
    }
    packs.sort_unstable();
    aside.sort_unstable();
    Ok((packs, aside))
}

/// One pack that is looked at.
struct Looking<'a> {
    paths: &'a RepositoryPaths,
    id: RepositoryId,
    number: u32,
    row: Option<&'a PackInfo>,
    dry_run: bool,
}

impl Looking<'_> {
    fn look(&self, report: &mut RepairedRepository) -> anyhow::Result<()> {
        let path = self.paths.pack(self.number);
        let open = File::options().read(true).write(!self.dry_run).open(&path);
        let file = open.with_context(|| format!("cannot open {}", path.display()))?;
        let domain = match pack_file::read_header(&file, &path) {
            Ok(header) if header.repository == self.id && header.number == self.number => Ok(header.domain),
            Ok(header) => Err(format!("is pack {:08x} of repository {}", header.number, header.repository)),
            Err(error) => Err(format!("has no readable header ({error})")),
        };
        let domain = match (domain, self.row) {
            (Ok(domain), _) => domain,
            (Err(why), Some(row)) => {
                let text =
                    format!("{why}; the catalog knows whose it is, and its blocks can be read: keep the catalog");
                report.findings.push(finding(self.number, FindingKind::Header, text));
                row.domain
            }
            (Err(_), None) if file.metadata()?.len() <= PACK_HEADER_BYTES as u64 => {
                let text = "is empty: a crash left it before anything was stored in it".to_owned();
                report.findings.push(finding(self.number, FindingKind::Empty, text));
                return Ok(());
            }
            (Err(why), None) => {
                let done = if self.dry_run { "a repair sets it aside" } else { "it was set aside" };
                let text = format!("{why}; nobody knows whose blocks are in it: {done}");
                report.findings.push(finding(self.number, FindingKind::Unattributable, text));
                return Ok(());
            }
        };
        match self.blocks(&file, &path, domain, report) {
            Ok(blocks) if self.dry_run => self.read(&blocks, report),
            Ok(_) => Ok(()),
            Err(error) => {
                report.findings.push(finding(self.number, FindingKind::Unreadable, error.to_string()));
                Ok(())
            }
        }
    }

    /// The pack's blocks: by its footer, or by a scan, after which it gets its footer.
    fn blocks(
        &self,
        file: &File,
        path: &Path,
        domain: DomainId,
        report: &mut RepairedRepository,
    ) -> Result<Vec<FooterEntry>, StorageError> {
        if let Some((footer, _)) = pack_file::read_footer(file, path)? {
            return Ok(footer.blocks);
        }
        let (blocks, done) = if self.dry_run {
            (pack_file::scan(file, path, self.id)?, "a repair appends one")
        } else {
            let contents = pack_file::recover(&SystemFiles, file, path, self.number, domain, self.id)?;
            let done = if contents.info.sealed { "a new one was appended" } else { "none could be appended" };
            (contents.blocks, done)
        };
        let lost = match self.row {
            Some(row) if row.sealed && (row.blocks as usize) > blocks.len() => {
                format!(", {} fewer than the catalog knows", row.blocks as usize - blocks.len())
            }
            _ => String::new(),
        };
        let text = format!("has no footer that can be trusted; {} blocks are intact{lost}; {done}", blocks.len());
        report.findings.push(finding(self.number, FindingKind::Footer, text));
        Ok(blocks)
    }

    /// Compares the digests of all blocks that count.
    fn read(&self, blocks: &[FooterEntry], report: &mut RepairedRepository) -> anyhow::Result<()> {
        let gone: Vec<u32> = pack_state::read(self.paths, self.id, self.number)?.iter().map(|row| row.offset).collect();
        let reader = PackReader::new(self.paths.clone());
        for entry in blocks.iter().filter(|entry| !gone.contains(&entry.offset)) {
            let wrong = match reader.read_block(self.number, entry.offset, entry.bytes) {
                Ok(block) => {
                    let listed = BlockView::parse(&block).is_ok_and(|view| view.stored_digest() == entry.digest);
                    let (offset, number) = (entry.offset, self.number);
                    (!listed).then(|| {
                        format!("the block at offset {offset} of pack {number:08x} is another than its pack lists")
                    })
                }
                Err(error) => Some(error.to_string()),
            };
            if let Some(wrong) = wrong {
                report.damaged_blocks += 1;
                if report.damaged.len() < limits::DAMAGE_ROWS_MAX {
                    report.damaged.push(wrong);
                }
            }
        }
        Ok(())
    }
}

/// Reads every block, withdraws what is damaged, and tells what cannot be restored.
async fn read_everything(repository: &Repository, report: &mut RepairedRepository) {
    let read = async {
        let summary: ScrubSummary = repository.scrub_noted(ScrubSubset::All, 0).await?;
        report.damaged_blocks = summary.damaged_blocks + summary.withdrawn_before;
        report.damaged = summary.damaged;
        repository.affected_snapshots(limits::DAMAGE_ROWS_MAX).await
    };
    match read.await {
        Ok(affected) => report.affected = Some(affected.iter().map(ToString::to_string).collect()),
        Err(error) => report.error = Some(error.to_string()),
    }
}
