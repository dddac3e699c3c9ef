//! `strand forget`: deletes snapshots that are named, or that a policy does not keep.
//!
//! What a policy keeps is decided here (`machines::retention`), by the times of the server's commits and in this machine's
//! time zone, with the repository's minimum retention. The server decides again what may go: it never deletes a snapshot that
//! is protected or younger than the minimum retention, and its answer is what is shown.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use jiff::tz::TimeZone;
use serde::Serialize;
use strandline_actors::machines::retention::{
    Count, Decision, Group, GroupKey, Policy, PolicyError, Reason, Subject, Terms, Verdict, Within,
};
use strandline_actors::runtime::clock;
use strandline_messages::SnapshotId;
use strandline_messages::wire::manage::Operation;

use super::Fate;
use super::args::Global;
use super::changes::{self, Kept};
use super::filter::{Filter, tags};
use super::output;
use super::prune::{self, Prune};
use super::repository::Opened;
use super::selector::{self, Snapshot};
use super::settings::Place;

/// `strand forget`.
#[derive(Args, Debug)]
pub struct Forget {
    /// Snapshots to delete, whatever a policy would say: ids or their beginnings, `latest` or `latest~N`
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    #[command(flatten)]
    policy: PolicyOptions,
    #[command(flatten)]
    filter: Filter,
    /// Apply the policy to each group of snapshots that have these in common: host, job, paths, tags; '' for one group
    #[arg(short, long, value_name = "LIST", default_value = "host,paths")]
    group_by: String,
    /// Delete nothing; tell what would be, and why the others would stay
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Then run `strand prune`: it frees what was deleted so long ago that it cannot be brought back any more
    #[arg(long)]
    prune: bool,
    /// Why, for those who look at deleted snapshots
    #[arg(long, value_name = "TEXT", default_value = "strand forget")]
    reason: String,
}

/// The policy. `N` is a number or `unlimited`.
#[derive(Args, Debug)]
#[expect(clippy::struct_field_names, reason = "the options are called so")]
struct PolicyOptions {
    /// Keep the last N snapshots
    #[arg(short = 'l', long, value_name = "N")]
    keep_last: Option<Count>,
    /// Keep the newest of each of the last N hours that have one
    #[arg(short = 'H', long, value_name = "N")]
    keep_hourly: Option<Count>,
    /// The same for days
    #[arg(short = 'd', long, value_name = "N")]
    keep_daily: Option<Count>,
    /// The same for weeks
    #[arg(short = 'w', long, value_name = "N")]
    keep_weekly: Option<Count>,
    /// The same for months
    #[arg(short = 'm', long, value_name = "N")]
    keep_monthly: Option<Count>,
    /// The same for quarters
    #[arg(long, value_name = "N")]
    keep_quarterly: Option<Count>,
    /// The same for years
    #[arg(short = 'y', long, value_name = "N")]
    keep_yearly: Option<Count>,
    /// Keep what is not older than SPAN (1y6m, 30d, 2w, 12h; m are months), seen from the newest snapshot
    #[arg(long, value_name = "SPAN")]
    keep_within: Option<Within>,
    /// Keep the newest of each hour within SPAN
    #[arg(long, value_name = "SPAN")]
    keep_within_hourly: Option<Within>,
    /// The same for days
    #[arg(long, value_name = "SPAN")]
    keep_within_daily: Option<Within>,
    /// The same for weeks
    #[arg(long, value_name = "SPAN")]
    keep_within_weekly: Option<Within>,
    /// The same for months
    #[arg(long, value_name = "SPAN")]
    keep_within_monthly: Option<Within>,
    /// The same for quarters
    #[arg(long, value_name = "SPAN")]
    keep_within_quarterly: Option<Within>,
    /// The same for years
    #[arg(long, value_name = "SPAN")]
    keep_within_yearly: Option<Within>,
    /// Keep what has all these tags; may be repeated
    #[arg(long, value_name = "TAG[,TAG]")]
    keep_tag: Vec<String>,
    /// Keep the snapshots whose ids begin so; may be repeated
    #[arg(long, value_name = "ID")]
    keep_id: Vec<String>,
}

impl Forget {
    fn policy(&self) -> Result<Policy, PolicyError> {
        let keep = &self.policy;
        let fields = self.group_by.split(',').map(str::trim).filter(|field| !field.is_empty());
        Ok(Policy {
            keep_last: keep.keep_last.unwrap_or_default(),
            keep_hourly: keep.keep_hourly.unwrap_or_default(),
            keep_daily: keep.keep_daily.unwrap_or_default(),
            keep_weekly: keep.keep_weekly.unwrap_or_default(),
            keep_monthly: keep.keep_monthly.unwrap_or_default(),
            keep_quarterly: keep.keep_quarterly.unwrap_or_default(),
            keep_yearly: keep.keep_yearly.unwrap_or_default(),
            keep_within: keep.keep_within,
            keep_within_hourly: keep.keep_within_hourly,
            keep_within_daily: keep.keep_within_daily,
            keep_within_weekly: keep.keep_within_weekly,
            keep_within_monthly: keep.keep_within_monthly,
            keep_within_quarterly: keep.keep_within_quarterly,
            keep_within_yearly: keep.keep_within_yearly,
            keep_tags: keep.keep_tag.iter().map(|list| tags(list)).collect(),
            keep_ids: keep.keep_id.iter().map(|id| id.to_ascii_lowercase()).collect(),
            group_by: fields.map(str::parse).collect::<Result<BTreeSet<_>, _>>()?,
        })
    }
}

/// What is to be done: the snapshots in the order in which they are shown, with what becomes of each.
struct Plan {
    groups: Vec<Group>,
}

impl Plan {
    /// Those that are to be deleted.
    fn removed(&self) -> Vec<SnapshotId> {
        let decisions = self.groups.iter().flat_map(|group| &group.decisions);
        decisions.filter(|decision| decision.verdict == Verdict::Remove).map(|decision| decision.id).collect()
    }
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, forget: &Forget) -> anyhow::Result<Fate> {
    let policy = forget.policy()?;
    match (forget.ids.is_empty(), policy.is_empty()) {
        (true, _) => policy.check()?,
        (false, true) if forget.filter.is_empty() => {}
        (false, _) => bail!("give either snapshot ids, or a policy with its filters, not both; nothing was removed"),
    }
    let opened = Opened::existing(global, place).await?;
    let done = remove(global, &opened, forget, &policy).await;
    let closed = opened.server.close().await;
    let fate = done?;
    closed?;
    Ok(fate)
}

async fn remove(global: &Global, opened: &Opened, forget: &Forget, policy: &Policy) -> anyhow::Result<Fate> {
    let all = selector::all(opened).await?;
    let min_retention = Duration::from_secs(opened.info.keeping.min_retention_s);
    let terms = terms(&all, min_retention);
    let by_name = !forget.ids.is_empty();
    let plan = if by_name {
        named(&selector::several(&all, &forget.ids)?, &terms, forget.dry_run)
    } else {
        let subjects = all.iter().filter(|snapshot| forget.filter.matches(snapshot)).map(subject);
        Plan { groups: policy.decide(subjects, &terms)? }
    };
    let removed = plan.removed();
    let kept = if forget.dry_run {
        Kept::new()
    } else {
        let operation = |snapshots| Operation::DeleteSnapshots { snapshots, reason: forget.reason.clone() };
        changes::in_batches(opened, &removed, operation).await?
    };
    let view = View { snapshots: all.iter().map(|snapshot| (snapshot.id, snapshot)).collect(), kept: &kept };
    let undelete = Duration::from_secs(opened.info.keeping.undelete_s);
    if global.json {
        view.print_json(&plan, forget.dry_run)?;
    } else {
        view.print(&plan, forget.dry_run, undelete)?;
    }
    if forget.prune {
        prune::pruned(global, opened, &Prune::after_forget(forget.dry_run)).await?;
    }
    // Whoever names a snapshot wants to know that it is still there; a policy's wishes may be denied.
    Ok(if by_name && view.totals(&plan).0 > 0 { Fate::Partial } else { Fate::Done })
}

/// Commit times are of the server's clock; where this machine's is behind, the newest snapshot tells the time.
fn terms(all: &[Snapshot], min_retention: Duration) -> Terms {
    let newest_ns = all.iter().map(|snapshot| snapshot.committed_ns).max().unwrap_or(i64::MIN);
    Terms { now_ns: clock::wall_ns().max(newest_ns), min_retention, zone: TimeZone::system() }
}

fn subject(snapshot: &Snapshot) -> Subject {
    Subject {
        id: snapshot.id,
        time_ns: snapshot.committed_ns,
        host: snapshot.manifest.host.clone(),
        job: snapshot.manifest.job.clone(),
        paths: snapshot.details.paths.clone(),
        tags: snapshot.tags.clone(),
        protected: snapshot.protected,
    }
}

/// Snapshots that are deleted because they are named. Only a dry run guesses which of them the server will keep.
fn named(chosen: &[&Snapshot], terms: &Terms, dry_run: bool) -> Plan {
    let decision = |snapshot: &&Snapshot| {
        let age_ns = i128::from(terms.now_ns) - i128::from(snapshot.committed_ns);
        let protected = snapshot.protected.then_some(Reason::Protected);
        let young = (age_ns.unsigned_abs() < terms.min_retention.as_nanos()).then_some(Reason::Young);
        let reasons: Vec<Reason> = protected.into_iter().chain(young).collect();
        let verdict = if dry_run && !reasons.is_empty() { Verdict::Keep { reasons } } else { Verdict::Remove };
        Decision { id: snapshot.id, verdict }
    };
    Plan { groups: vec![Group { key: GroupKey::default(), decisions: chosen.iter().map(decision).collect() }] }
}

#[derive(Serialize)]
struct Row<'a> {
    id: String,
    short_id: String,
    time: String,
    committed: String,
    host: &'a str,
    job: &'a str,
    tags: &'a [String],
    paths: Vec<String>,
    /// `keep` or `remove`.
    action: &'static str,
    reasons: Vec<String>,
}

#[derive(Serialize)]
struct Summary {
    message_type: &'static str,
    dry_run: bool,
    kept: usize,
    removed: usize,
}

/// Shows a plan, and what the server made of it.
struct View<'a> {
    snapshots: HashMap<SnapshotId, &'a Snapshot>,
    kept: &'a Kept,
}

impl View<'_> {
    /// A group's rows, oldest first as in other listings: the snapshot, whether it goes, and why not.
    fn rows(&self, group: &Group) -> Vec<(&Snapshot, bool, Vec<String>)> {
        let row = |decision: &Decision| {
            let snapshot = *self.snapshots.get(&decision.id)?;
            Some(match (&decision.verdict, self.kept.get(&decision.id)) {
                (Verdict::Keep { reasons }, _) => (snapshot, false, reasons.iter().map(Reason::to_string).collect()),
                (Verdict::Remove, Some(reason)) => (snapshot, false, vec![format!("the server keeps it: {reason}")]),
                (Verdict::Remove, None) => (snapshot, true, Vec::new()),
            })
        };
        group.decisions.iter().rev().filter_map(row).collect()
    }

    fn totals(&self, plan: &Plan) -> (usize, usize) {
        let rows = plan.groups.iter().flat_map(|group| self.rows(group));
        rows.fold((0, 0), |(kept, removed), (_, goes, _)| (kept + usize::from(!goes), removed + usize::from(goes)))
    }

    fn print_json(&self, plan: &Plan, dry_run: bool) -> anyhow::Result<()> {
        for (snapshot, goes, reasons) in plan.groups.iter().flat_map(|group| self.rows(group)) {
            output::json_line(&Row {
                id: snapshot.id.to_string(),
                short_id: snapshot.id.short(),
                time: output::rfc3339(snapshot.manifest.started_ns),
                committed: output::rfc3339(snapshot.committed_ns),
                host: &snapshot.manifest.host,
                job: &snapshot.manifest.job,
                tags: &snapshot.tags,
                paths: snapshot.details.paths.iter().map(|path| output::path(path)).collect(),
                action: if goes { "remove" } else { "keep" },
                reasons,
            })?;
        }
        let (kept, removed) = self.totals(plan);
        output::json_line(&Summary { message_type: "summary", dry_run, kept, removed })
    }

    fn print(&self, plan: &Plan, dry_run: bool, undelete: Duration) -> anyhow::Result<()> {
        let mut text = String::new();
        for group in &plan.groups {
            text += &title(&group.key);
            let cells = |(snapshot, goes, reasons): (&Snapshot, bool, Vec<String>)| {
                let verdict = if goes { "remove" } else { "keep" };
                let time = output::moment(snapshot.committed_ns);
                let tags = snapshot.tags.join(",");
                vec![snapshot.id.short(), time, tags, verdict.to_owned(), reasons.join("; ")]
            };
            let rows: Vec<_> = self.rows(group).into_iter().map(cells).collect();
            text += &output::table(&["ID", "COMMITTED", "TAGS", "VERDICT", "WHY"], &rows);
            text.push('\n');
        }
        let (kept, removed) = self.totals(plan);
        text += &match (dry_run, removed) {
            (true, _) => format!("{removed} would be removed, {kept} kept; nothing was changed\n"),
            (false, 0) => format!("none removed, {kept} kept\n"),
            (false, _) => format!(
                "{removed} removed, {kept} kept; `strand undelete ID` brings a removed one back within {}\n",
                days(undelete)
            ),
        };
        output::print(text.as_bytes())
    }
}

/// What the snapshots of a group have in common, as a line; nothing if they are not grouped.
fn title(key: &GroupKey) -> String {
    let texts = |name: &str, list: &Option<Vec<String>>| list.as_ref().map(|list| format!("{name} {}", list.join(" ")));
    let one = |text: &Option<String>| text.clone().map(|text| vec![text]);
    let paths = key.paths.as_ref().map(|paths| paths.iter().map(|path| output::path(path)).collect());
    let parts = [
        texts("host", &one(&key.host)),
        texts("job", &one(&key.job)),
        texts("paths", &paths),
        texts("tags", &key.tags),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() { String::new() } else { parts.join(", ") + "\n" }
}

fn days(time: Duration) -> String {
    match time.as_secs() / 86_400 {
        0 => output::span(time),
        1 => "1 day".to_owned(),
        days => format!("{days} days"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        forget: Forget,
    }

    fn parsed(line: &str) -> Forget {
        Line::try_parse_from(line.split(' ')).unwrap().forget
    }

    #[test]
    fn the_command_line_is_a_policy_in_restics_words() {
        let policy = parsed("forget -l 1 -H 2 -d 3 -w 4 -m 5 -y unlimited --keep-within 1y6m --keep-tag a,b -g host");
        let policy = policy.policy().unwrap();
        assert_eq!((policy.keep_last, policy.keep_hourly), (Count::AtMost(1), Count::AtMost(2)));
        assert_eq!((policy.keep_monthly, policy.keep_yearly), (Count::AtMost(5), Count::Unlimited));
        assert_eq!(policy.keep_within, Some("1y6m".parse().unwrap()));
        assert_eq!(policy.keep_tags, [BTreeSet::from(["a".to_owned(), "b".to_owned()])]);
        assert_eq!(policy.group_by.len(), 1);
        assert_eq!(parsed("forget -l 1").policy().unwrap().group_by.len(), 2, "host and paths, as in restic");
        assert!(parsed("forget").policy().unwrap().is_empty());
        assert!(parsed("forget -l 1 -g hots").policy().is_err());
        assert!(Line::try_parse_from(["forget", "--keep-within", "7"]).is_err());
    }
}
