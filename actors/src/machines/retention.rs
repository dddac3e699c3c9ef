//! Which snapshots a policy keeps, and why: restic's rules, and one more that nobody can flood.
//!
//! A policy looks at committed snapshots only, in groups, newest first. Their time is that of the server's commit: an agent's
//! clock, and whoever controls an agent, has no say in it. Calendar periods are those of a given time zone.
//!
//! - `keep_last` keeps the newest N. `keep_hourly` … `keep_yearly` keep the newest snapshot of each of the N newest periods
//!   that have one. `keep_within` keeps what is at most so much older than the newest snapshot (not than today: a machine that
//!   stopped is not forgotten), `keep_within_hourly` … the newest of each period in that span.
//! - As in restic, the oldest snapshot is kept for a periodic rule that still has periods left: the beginning of a history
//!   stays until the history is as long as the rule asks for.
//! - `keep_tags`, `keep_ids`: whatever has all tags of one of the sets, or an id that begins so.
//! - Protected snapshots, and the newest of each group, are kept whatever the policy says: no policy empties a group.
//!
//! **Young snapshots.** One that is younger than the minimum retention (or from the future) is kept, and apart from that the
//! rules are applied *as if it did not exist*: it takes nobody's place in `keep_last`, is no period's newest, and moves no
//! span. So whatever a thief makes an agent commit, be it ten thousand snapshots, changes nothing about older snapshots until
//! it has itself reached the minimum retention; the owner has that long to notice. With a minimum retention of zero there is
//! no such delay. The price: as many snapshots more are kept as are young.
//!
//! Bounds: memory in proportion to the number of snapshots given, time O(n log n) with one calendar computation each.

mod policy;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use serde::Serialize;
use strandline_messages::SnapshotId;

pub use policy::{Count, GroupBy, Period, Policy, PolicyError, Within};

/// A committed snapshot as a policy sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Its id.
    pub id: SnapshotId,
    /// When the server committed it, ns since 1970.
    pub time_ns: i64,
    /// Host label.
    pub host: String,
    /// Job label.
    pub job: String,
    /// The paths that were saved, raw; empty where they cannot be read (a server has no key): group by something else there.
    pub paths: Vec<Vec<u8>>,
    /// Its tags of today.
    pub tags: Vec<String>,
    /// Nobody may delete it.
    pub protected: bool,
}

/// What a policy is applied under.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Now, ns since 1970, by the clock that the snapshots' times are of.
    pub now_ns: i64,
    /// Snapshots younger than this are kept and not counted.
    pub min_retention: Duration,
    /// Whose calendar hours, days and so on are meant.
    pub zone: TimeZone,
}

/// What snapshots of one group have in common; `None` where the policy does not group by it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupKey {
    /// Host label.
    pub host: Option<String>,
    /// Job label.
    pub job: Option<String>,
    /// Paths, in ascending order.
    pub paths: Option<Vec<Vec<u8>>>,
    /// Tags, in ascending order.
    pub tags: Option<Vec<String>>,
}

/// One group and what becomes of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// What they have in common.
    pub key: GroupKey,
    /// Its snapshots, newest first.
    pub decisions: Vec<Decision>,
}

/// What becomes of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Which.
    pub id: SnapshotId,
    /// What.
    pub verdict: Verdict,
}

/// Kept or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays.
    Keep {
        /// Why; at least one.
        reasons: Vec<Reason>,
    },
    /// No rule keeps it.
    Remove,
}

/// Why a snapshot is kept. `Display` says it for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Reason {
    /// Nobody may delete it.
    Protected,
    /// Younger than the minimum retention.
    Young,
    /// The newest of its group (among those that are not young).
    Newest,
    /// One of the last N.
    Last,
    /// The newest of a period; its name, such as `2026-11-24`.
    Newly(Period, String),
    /// The oldest of its group, and the rule has periods left.
    Oldest(Period),
    /// Not older than that, seen from the newest.
    Within(Within),
    /// The newest of a period, and not older than that.
    NewlyWithin(Period, String, Within),
    /// It has all these tags.
    Tagged(BTreeSet<String>),
    /// Its id begins so.
    Named(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protected => f.write_str("protected"),
            Self::Young => f.write_str("younger than the minimum retention"),
            Self::Newest => f.write_str("newest of its group"),
            Self::Last => f.write_str("one of the last"),
            Self::Newly(period, name) => write!(f, "{period} snapshot {name}"),
            Self::Oldest(period) => write!(f, "oldest, {period} snapshots are not complete yet"),
            Self::Within(span) => write!(f, "within {span}"),
            Self::NewlyWithin(period, name, span) => write!(f, "{period} snapshot {name} within {span}"),
            Self::Tagged(tags) => write!(f, "tagged {}", tags.iter().map(String::as_str).collect::<Vec<_>>().join(",")),
            Self::Named(prefix) => write!(f, "id begins with {prefix}"),
        }
    }
}

impl Policy {
    /// Decides about snapshots, whatever their order; groups ascend by key.
    pub fn decide(
        &self,
        subjects: impl IntoIterator<Item = Subject>,
        terms: &Terms,
    ) -> Result<Vec<Group>, PolicyError> {
        self.check()?;
        let mut groups: BTreeMap<GroupKey, Vec<Subject>> = BTreeMap::new();
        for subject in subjects {
            groups.entry(self.key(&subject)).or_default().push(subject);
        }
        let decide = |(key, subjects)| Group { key, decisions: self.decide_group(subjects, terms) };
        Ok(groups.into_iter().map(decide).collect())
    }

    fn key(&self, subject: &Subject) -> GroupKey {
        let by = |field| self.group_by.contains(&field);
        let sorted = |mut list: Vec<Vec<u8>>| {
            list.sort_unstable();
            list
        };
        GroupKey {
            host: by(GroupBy::Host).then(|| subject.host.clone()),
            job: by(GroupBy::Job).then(|| subject.job.clone()),
            paths: by(GroupBy::Paths).then(|| sorted(subject.paths.clone())),
            tags: by(GroupBy::Tags).then(|| {
                let tags: BTreeSet<String> = subject.tags.iter().cloned().collect();
                tags.into_iter().collect()
            }),
        }
    }

    fn decide_group(&self, mut subjects: Vec<Subject>, terms: &Terms) -> Vec<Decision> {
        subjects.sort_unstable_by_key(|subject| std::cmp::Reverse((subject.time_ns, subject.id)));
        let is_young = |subject: &Subject| {
            let age_ns = i128::from(terms.now_ns) - i128::from(subject.time_ns);
            age_ns < 0 || age_ns.unsigned_abs() < terms.min_retention.as_nanos()
        };
        // Newest first: the young ones stand at the front.
        let young = subjects.partition_point(is_young);
        let counted = subjects.get(young..).unwrap_or_default();
        let mut rules = counted.first().map(|newest| self.rules(newest, &terms.zone)).unwrap_or_default();
        let decide = |(at, subject): (usize, &Subject)| {
            let mut reasons = Vec::new();
            if subject.protected {
                reasons.push(Reason::Protected);
            }
            match at.checked_sub(young) {
                None => reasons.push(Reason::Young),
                Some(place) => {
                    let calendar = zoned(subject.time_ns, &terms.zone);
                    let oldest = place + 1 == counted.len();
                    reasons.extend(rules.iter_mut().filter_map(|rule| rule.apply(subject, &calendar, oldest)));
                }
            }
            reasons.extend(self.named(subject));
            if reasons.is_empty() && at == young {
                reasons.push(Reason::Newest);
            }
            let verdict = if reasons.is_empty() { Verdict::Remove } else { Verdict::Keep { reasons } };
            Decision { id: subject.id, verdict }
        };
        subjects.iter().enumerate().map(decide).collect()
    }

    /// The rules that count or measure, as they are before the first snapshot.
    fn rules(&self, newest: &Subject, zone: &TimeZone) -> Vec<Rule> {
        let since = |span: Within| span.before(&zoned(newest.time_ns, zone));
        let rule = |kind, left, since_ns| Rule { kind, left, since_ns, last: None };
        let last = rule(RuleKind::Last, self.keep_last, i64::MIN);
        let counted = self.counts().map(|(period, count)| rule(RuleKind::Newly(period), count, i64::MIN));
        let within = self.keep_within.map(|span| rule(RuleKind::Within(span), Count::Unlimited, since(span)));
        let spans = self.spans().into_iter().filter_map(|(period, span)| {
            span.map(|span| rule(RuleKind::NewlyWithin(period, span), Count::Unlimited, since(span)))
        });
        [last].into_iter().chain(counted).chain(within).chain(spans).collect()
    }

    fn named(&self, subject: &Subject) -> Vec<Reason> {
        let tags = self.keep_tags.iter().filter(|set| set.iter().all(|tag| subject.tags.contains(tag)));
        let id = subject.id.to_string();
        let ids = self.keep_ids.iter().filter(|prefix| id.starts_with(prefix.as_str()));
        tags.map(|set| Reason::Tagged(set.clone())).chain(ids.map(|prefix| Reason::Named(prefix.clone()))).collect()
    }
}

enum RuleKind {
    Last,
    Newly(Period),
    Within(Within),
    NewlyWithin(Period, Within),
}

/// A rule on its way from the newest snapshot to the oldest.
struct Rule {
    kind: RuleKind,
    /// How many it may still keep.
    left: Count,
    /// It keeps nothing older.
    since_ns: i64,
    /// The period that it kept a snapshot of last.
    last: Option<(i64, i64)>,
}

impl Rule {
    /// Whether it keeps this snapshot. `oldest`: there is none after it.
    fn apply(&mut self, subject: &Subject, calendar: &Zoned, oldest: bool) -> Option<Reason> {
        if self.left.is_none() || subject.time_ns < self.since_ns {
            return None;
        }
        let period = match &self.kind {
            RuleKind::Last | RuleKind::Within(_) => None,
            RuleKind::Newly(period) | RuleKind::NewlyWithin(period, _) => Some(*period),
        };
        let bucket = period.map(|period| period.bucket(calendar));
        let first = bucket.is_none() || bucket != self.last;
        if !first && !oldest {
            return None;
        }
        self.last = bucket;
        self.left.take_one();
        Some(match (&self.kind, first) {
            (RuleKind::Last, _) => Reason::Last,
            (RuleKind::Within(span), _) => Reason::Within(*span),
            (RuleKind::Newly(period), true) => Reason::Newly(*period, period.name(calendar)),
            (RuleKind::NewlyWithin(period, span), true) => Reason::NewlyWithin(*period, period.name(calendar), *span),
            (RuleKind::Newly(period) | RuleKind::NewlyWithin(period, _), false) => Reason::Oldest(*period),
        })
    }
}

fn zoned(ns: i64, zone: &TimeZone) -> Zoned {
    // Every `i64` of nanoseconds is a moment between the years 1677 and 2262.
    Timestamp::from_nanosecond(ns.into()).unwrap_or_default().to_zoned(zone.clone())
}
