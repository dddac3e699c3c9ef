//! `strand tag`.

use std::collections::BTreeSet;

use anyhow::{Context, bail};
use clap::Args;
use strandline_actors::runtime::clock;
use strandline_messages::limits;
use strandline_messages::wire::manage::Operation;

use super::Fate;
use super::args::Global;
use super::changes::{self, Kept};
use super::filter::{Filter, tags};
use super::repository::Opened;
use super::selector::{self, Snapshot};
use super::settings::Place;

/// `strand tag`.
#[derive(Args, Debug)]
pub struct Tag {
    /// Ids or their beginnings, `latest` or `latest~N` [default: all that --host, --tag and --path leave]
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    /// Give them exactly these tags; `''` takes all away
    #[arg(long, value_name = "TAG[,TAG]", conflicts_with_all = ["add", "remove"])]
    set: Vec<String>,
    /// Give them these tags, too
    #[arg(long, value_name = "TAG[,TAG]")]
    add: Vec<String>,
    /// Take these tags away
    #[arg(long, value_name = "TAG[,TAG]")]
    remove: Vec<String>,
    #[command(flatten)]
    filter: Filter,
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, tag: &Tag) -> anyhow::Result<Fate> {
    if tag.set.is_empty() && tag.add.is_empty() && tag.remove.is_empty() {
        bail!("say what to change: --add TAG, --remove TAG or --set TAG; nothing was changed");
    }
    if tag.ids.is_empty() && tag.filter.is_empty() {
        bail!("say which snapshots: ids, or --host, --tag or --path; nothing was changed");
    }
    let opened = Opened::existing(global, place).await?;
    let done = change(global, &opened, tag).await;
    let closed = opened.server.close().await;
    let fate = done?;
    closed?;
    Ok(fate)
}

async fn change(global: &Global, opened: &Opened, tag: &Tag) -> anyhow::Result<Fate> {
    let all = selector::all(opened).await?;
    let named = if tag.ids.is_empty() { all.iter().collect() } else { selector::several(&all, &tag.ids)? };
    let mut planned = Vec::new();
    for snapshot in named.into_iter().filter(|snapshot| tag.filter.matches(snapshot)) {
        let tags = changed(tag, snapshot);
        check(&tags)?;
        if tags != snapshot.tags {
            planned.push(Snapshot { tags, ..snapshot.clone() });
        }
    }
    let mut kept = Kept::new();
    for (done, snapshot) in planned.iter().enumerate() {
        let signed = opened.keyset.sign_snapshot_tags(snapshot.id, snapshot.tags.clone(), clock::wall_ns())?;
        let server = &opened.server;
        let outcome = server.client.manage(&server.name, &opened.keyset, &Operation::TagSnapshot(signed)).await;
        let outcome = outcome.with_context(|| format!("{done} of {} snapshots were tagged anew", planned.len()))?;
        kept.extend(changes::reasons(outcome));
    }
    if planned.is_empty() && !global.json {
        super::output::print(b"no snapshot has other tags than it should have\n")?;
    } else {
        changes::print(global.json, &planned.iter().collect::<Vec<_>>(), "tagged", &kept)?;
    }
    Ok(if kept.is_empty() { Fate::Done } else { Fate::Partial })
}

/// A snapshot's tags after the command, ascending.
fn changed(tag: &Tag, snapshot: &Snapshot) -> Vec<String> {
    let all = |lists: &[String]| lists.iter().flat_map(|list| tags(list)).collect::<BTreeSet<String>>();
    let now: BTreeSet<String> = if tag.set.is_empty() {
        let removed = all(&tag.remove);
        snapshot.tags.iter().cloned().chain(all(&tag.add)).filter(|tag| !removed.contains(tag)).collect()
    } else {
        all(&tag.set)
    };
    now.into_iter().collect()
}

fn check(tags: &[String]) -> anyhow::Result<()> {
    if tags.len() > limits::TAGS_MAX {
        bail!("a snapshot would have {} tags, more than {}; nothing was changed", tags.len(), limits::TAGS_MAX);
    }
    match tags.iter().find(|tag| tag.len() > limits::TAG_BYTES_MAX) {
        Some(tag) => bail!("the tag `{tag}` is longer than {} bytes; nothing was changed", limits::TAG_BYTES_MAX),
        None => Ok(()),
    }
}
