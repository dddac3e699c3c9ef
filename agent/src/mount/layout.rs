//! The directories above the snapshots: `ids`, `snapshots`, `hosts` and `tags`, as restic names them.
//!
//! Pure: a list of snapshots in, names out. Memory: a few names for each snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use strandline_messages::{ChunkId, SnapshotId};

/// Longest name that a directory can have, bytes.
const NAME_BYTES_MAX: usize = 255;
/// The link to the newest snapshot of a place.
const LATEST: &[u8] = b"latest";

/// A snapshot to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its id.
    pub id: SnapshotId,
    /// Its place in the order of commits.
    pub order: u64,
    /// The top node of its root directory.
    pub root: ChunkId,
    /// When it was begun, ns since 1970.
    pub started_ns: i64,
    /// Its host label.
    pub host: String,
    /// Its tags.
    pub tags: Vec<String>,
}

/// A directory that the mount itself makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Top,
    Ids,
    Snapshots,
    Hosts,
    Host(Arc<[u8]>),
    Tags,
    Tag(Arc<[u8]>),
}

/// What stands in such a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Child {
    Place(Place),
    Snapshot(Arc<Shown>),
    /// The newest snapshot and its name beside the link.
    Latest(Arc<Shown>, Arc<[u8]>),
}

/// The names of a directory, in order.
pub(super) type Names = BTreeMap<Arc<[u8]>, Child>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Layout {
    top: Names,
    ids: Names,
    snapshots: Names,
    hosts: Names,
    tags: Names,
    by_host: BTreeMap<Arc<[u8]>, Names>,
    by_tag: BTreeMap<Arc<[u8]>, Names>,
    nothing: Names,
}

impl Layout {
    /// `shown` in the order of their commits, each once.
    pub(super) fn new(shown: &[Arc<Shown>], zone: &TimeZone) -> Self {
        let mut layout = Self::default();
        for (name, place) in [
            (&b"ids"[..], Place::Ids),
            (b"snapshots", Place::Snapshots),
            (b"hosts", Place::Hosts),
            (b"tags", Place::Tags),
        ] {
            layout.top.insert(name.into(), Child::Place(place));
        }
        for snapshot in shown {
            layout.add_id(snapshot);
            let time = time_name(snapshot.started_ns, zone);
            add_time(&mut layout.snapshots, &time, snapshot);
            let host = file_name(&snapshot.host);
            layout.hosts.entry(Arc::clone(&host)).or_insert_with(|| Child::Place(Place::Host(Arc::clone(&host))));
            add_time(layout.by_host.entry(host).or_default(), &time, snapshot);
            let tags: BTreeSet<_> = snapshot.tags.iter().map(|tag| file_name(tag)).collect();
            for tag in tags {
                layout.tags.entry(Arc::clone(&tag)).or_insert_with(|| Child::Place(Place::Tag(Arc::clone(&tag))));
                add_time(layout.by_tag.entry(tag).or_default(), &time, snapshot);
            }
        }
        layout
    }

    fn add_id(&mut self, snapshot: &Arc<Shown>) {
        let short = snapshot.id.short();
        let taken = self.ids.contains_key(short.as_bytes());
        let name = if taken { snapshot.id.to_string() } else { short };
        self.ids.insert(name.into_bytes().into(), Child::Snapshot(Arc::clone(snapshot)));
    }

    /// What stands in `place`, in the order of the names; nothing in one that is gone.
    pub(super) fn names(&self, place: &Place) -> &Names {
        match place {
            Place::Top => &self.top,
            Place::Ids => &self.ids,
            Place::Snapshots => &self.snapshots,
            Place::Hosts => &self.hosts,
            Place::Tags => &self.tags,
            Place::Host(host) => self.by_host.get(host).unwrap_or(&self.nothing),
            Place::Tag(tag) => self.by_tag.get(tag).unwrap_or(&self.nothing),
        }
    }
}

/// Puts a snapshot under its time, and `latest` to it: snapshots come in the order of their commits.
fn add_time(names: &mut Names, time: &str, snapshot: &Arc<Shown>) {
    let mut name: Arc<[u8]> = time.as_bytes().into();
    let mut again = 0;
    while names.contains_key(&name) {
        again += 1;
        name = format!("{time}-{again}").into_bytes().into();
    }
    names.insert(Arc::clone(&name), Child::Snapshot(Arc::clone(snapshot)));
    names.insert(LATEST.into(), Child::Latest(Arc::clone(snapshot), name));
}

/// `2026-03-01T04:05:06+01:00`, or with `Z` in UTC: how restic names snapshots.
fn time_name(ns: i64, zone: &TimeZone) -> String {
    let Ok(time) = Timestamp::from_nanosecond(ns.into()) else { return "unknown".to_owned() };
    let local = time.to_zoned(zone.clone());
    let zone = if local.offset().seconds() == 0 { "Z" } else { "%:z" };
    local.strftime(&format!("%Y-%m-%dT%H:%M:%S{zone}")).to_string()
}

/// A label as the name of a directory: no `/`, no NUL, neither empty nor `.` nor `..`, nor too long.
fn file_name(label: &str) -> Arc<[u8]> {
    let mut name = label.replace(['/', '\0'], "_");
    while name.len() > NAME_BYTES_MAX {
        name.pop();
    }
    if matches!(name.as_str(), "" | "." | "..") {
        name = format!("_{name}");
    }
    name.into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(number: u8, order: u64, started_s: i64, host: &str, tags: &[&str]) -> Arc<Shown> {
        Arc::new(Shown {
            id: SnapshotId([number; 32]),
            order,
            root: ChunkId([number; 32]),
            started_ns: started_s * 1_000_000_000,
            host: host.to_owned(),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        })
    }

    fn listed(layout: &Layout, place: &Place) -> Vec<String> {
        let line = |(name, child): (&Arc<[u8]>, &Child)| {
            let name = String::from_utf8_lossy(name).into_owned();
            match child {
                Child::Latest(_, target) => format!("{name} -> {}", String::from_utf8_lossy(target)),
                _ => name,
            }
        };
        layout.names(place).iter().map(line).collect()
    }

    #[test]
    fn snapshots_stand_under_their_ids_times_hosts_and_tags() {
        let all =
            [shown(1, 1, 0, "web", &["daily"]), shown(2, 2, 0, "web", &[]), shown(3, 3, 60, "a/b", &["daily", "x"])];
        let layout = Layout::new(&all, &TimeZone::UTC);
        assert_eq!(listed(&layout, &Place::Top), ["hosts", "ids", "snapshots", "tags"]);
        assert_eq!(listed(&layout, &Place::Ids), ["01010101", "02020202", "03030303"]);
        let times = ["1970-01-01T00:00:00Z", "1970-01-01T00:00:00Z-1", "1970-01-01T00:01:00Z"];
        let with = |latest: &str, times: &[&str]| {
            let mut names: Vec<String> = times.iter().map(|name| (*name).to_owned()).collect();
            names.push(format!("latest -> {latest}"));
            names
        };
        assert_eq!(listed(&layout, &Place::Snapshots), with(times[2], &times));
        assert_eq!(listed(&layout, &Place::Hosts), ["a_b", "web"]);
        assert_eq!(listed(&layout, &Place::Host(b"web"[..].into())), with(times[1], &times[..2]));
        assert_eq!(listed(&layout, &Place::Tags), ["daily", "x"]);
        assert_eq!(listed(&layout, &Place::Tag(b"daily"[..].into())), with(times[2], &[times[0], times[2]]));
        assert!(listed(&layout, &Place::Tag(b"gone"[..].into())).is_empty());
    }

    #[test]
    fn names_are_legal_whatever_the_labels_are() {
        assert_eq!(&*file_name(""), b"_");
        assert_eq!(&*file_name(".."), b"_..");
        assert_eq!(&*file_name("../etc"), b".._etc");
        assert_eq!(file_name(&"é".repeat(200)).len(), 254);
        let two = [shown(1, 1, 0, "..", &[]), shown(1, 2, 0, "_..", &[])];
        let layout = Layout::new(&two, &TimeZone::UTC);
        assert_eq!(listed(&layout, &Place::Hosts), ["_.."]);
        assert_eq!(layout.names(&Place::Ids).len(), 2, "ids that begin alike are told apart");
    }

    #[test]
    fn times_are_those_of_the_zone() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        assert_eq!(time_name(0, &zone), "1970-01-01T02:00:00+02:00");
        assert_eq!(time_name(0, &TimeZone::UTC), "1970-01-01T00:00:00Z");
    }
}
