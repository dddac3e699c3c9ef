//! What a retention policy keeps: restic's rules by example, and the promises that hold for every history.

#![expect(clippy::unwrap_used, clippy::unnecessary_wraps, reason = "helpers of tests fail their test by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::civil::date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use proptest::prelude::*;
use strandline_actors::machines::retention::{
    Count, Group, GroupBy, Policy, PolicyError, Reason, Subject, Terms, Verdict, Within,
};
use strandline_messages::SnapshotId;

const HOUR_NS: i64 = 3_600_000_000_000;
const DAY_NS: i64 = 24 * HOUR_NS;
/// 2026-11-24 12:00 UTC, a Tuesday.
const NOW_NS: i64 = 1_795_521_600_000_000_000;

fn id(number: u64) -> SnapshotId {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    SnapshotId(bytes)
}

fn snapshot(number: u64, time_ns: i64) -> Subject {
    let paths = vec![b"/home".to_vec()];
    Subject { id: id(number), time_ns, host: "web".into(), job: String::new(), paths, tags: vec![], protected: false }
}

/// A snapshot at each of these hours before now.
fn at_hours(hours: &[i64]) -> Vec<Subject> {
    (0..).zip(hours).map(|(number, hours)| snapshot(number, NOW_NS - hours * HOUR_NS)).collect()
}

fn terms(min_retention: Duration) -> Terms {
    Terms { now_ns: NOW_NS, min_retention, zone: TimeZone::UTC }
}

fn decide(policy: &Policy, subjects: &[Subject], terms: &Terms) -> Vec<Group> {
    policy.decide(subjects.to_vec(), terms).unwrap()
}

fn kept(policy: &Policy, subjects: &[Subject], terms: &Terms) -> BTreeSet<SnapshotId> {
    let groups = decide(policy, subjects, terms);
    let decisions = groups.iter().flat_map(|group| &group.decisions);
    decisions.filter(|decision| decision.verdict != Verdict::Remove).map(|decision| decision.id).collect()
}

fn kept_hours(policy: &Policy, hours: &[i64]) -> Vec<i64> {
    let kept = kept(policy, &at_hours(hours), &terms(Duration::ZERO));
    (0..).zip(hours).filter(|(number, _)| kept.contains(&id(*number))).map(|(_, hours)| *hours).collect()
}

fn reasons(policy: &Policy, subjects: &[Subject], terms: &Terms) -> Vec<String> {
    let text = |verdict: &Verdict| match verdict {
        Verdict::Remove => "-".to_owned(),
        Verdict::Keep { reasons } => reasons.iter().map(Reason::to_string).collect::<Vec<_>>().join("; "),
    };
    decide(policy, subjects, terms).iter().flat_map(|group| &group.decisions).map(|d| text(&d.verdict)).collect()
}

fn within(text: &str) -> Option<Within> {
    Some(text.parse().unwrap())
}

#[test]
fn the_newest_of_each_period_is_kept_and_the_oldest_until_the_periods_are_used_up() {
    // Hours before Tuesday noon: today, today, yesterday ×2, two days ago ×2.
    let hours = [1, 5, 20, 30, 40, 50];
    let daily = |n| Policy { keep_daily: Count::AtMost(n), ..Policy::default() };
    assert_eq!(kept_hours(&daily(1), &hours), [1]);
    assert_eq!(kept_hours(&daily(2), &hours), [1, 20]);
    assert_eq!(kept_hours(&daily(3), &hours), [1, 20, 40], "three periods are used up");
    assert_eq!(kept_hours(&daily(4), &hours), [1, 20, 40, 50], "the fourth is not: the oldest stays");
    assert_eq!(kept_hours(&Policy { keep_daily: Count::Unlimited, ..Policy::default() }, &hours), [1, 20, 40, 50]);
    assert_eq!(kept_hours(&Policy { keep_last: Count::AtMost(2), ..Policy::default() }, &hours), [1, 5]);
}

#[test]
fn spans_count_from_the_newest_snapshot_so_that_a_machine_that_stopped_is_not_forgotten() {
    let hours = [1000, 1010, 1030, 1100];
    let policy = Policy { keep_within: within("1d"), ..Policy::default() };
    assert_eq!(kept_hours(&policy, &hours), [1000, 1010]);
    let policy = Policy { keep_within: within("1d6h"), ..Policy::default() };
    assert_eq!(kept_hours(&policy, &hours), [1000, 1010, 1030], "what is exactly so old is within");
}

#[test]
fn reasons_are_told_for_people() {
    let mut subjects = at_hours(&[1, 30, 60, 90, 24 * 40]);
    subjects[2].tags = vec!["gold".into(), "x".into()];
    subjects[4].protected = true;
    let policy = Policy {
        keep_last: Count::AtMost(1),
        keep_daily: Count::AtMost(2),
        keep_within: within("7h"),
        keep_within_monthly: within("1y"),
        keep_tags: vec![BTreeSet::from(["gold".into()])],
        keep_ids: vec!["00000000".into()],
        ..Policy::default()
    };
    let told = reasons(&policy, &subjects, &terms(Duration::ZERO));
    assert_eq!(
        told[0],
        "one of the last; daily snapshot 2026-11-24; within 7h; monthly snapshot 2026-11 within 1y; id begins with 00000000"
    );
    assert_eq!(told[1], "daily snapshot 2026-11-23; id begins with 00000000");
    assert_eq!(told[2], "tagged gold; id begins with 00000000");
    assert_eq!(told[4], "protected; monthly snapshot 2026-10 within 1y; id begins with 00000000");
    let told = reasons(&Policy { keep_ids: Vec::new(), ..policy }, &subjects, &terms(Duration::from_hours(24)));
    assert_eq!(told[0], "younger than the minimum retention");
    assert_eq!(told[3], "-");
}

#[test]
fn periods_are_those_of_the_time_zone_and_no_hour_is_lost_when_clocks_are_set_back() {
    let berlin = TimeZone::get("Europe/Berlin");
    // Without the system's time zones there is nothing to test here.
    let Ok(berlin) = berlin else { return };
    // 23:30 UTC is half past midnight in Berlin: another day there.
    let evening = date(2026, 11, 23).at(23, 30, 0, 0).to_zoned(TimeZone::UTC).unwrap();
    let noon = date(2026, 11, 23).at(12, 0, 0, 0).to_zoned(TimeZone::UTC).unwrap();
    let ns = |moment: &jiff::Zoned| i64::try_from(moment.timestamp().as_nanosecond()).unwrap();
    let subjects = [snapshot(1, ns(&evening)), snapshot(2, ns(&noon)), snapshot(3, ns(&noon) - 300 * DAY_NS)];
    let policy = Policy { keep_daily: Count::AtMost(2), ..Policy::default() };
    let in_zone = |zone: &TimeZone| kept(&policy, &subjects, &Terms { zone: zone.clone(), ..terms(Duration::ZERO) });
    assert_eq!(in_zone(&berlin), BTreeSet::from([id(1), id(2)]));
    assert_eq!(in_zone(&TimeZone::UTC), BTreeSet::from([id(1), id(3)]));
    // 00:30 and 01:30 UTC are both half past two in Berlin on that day.
    let first: Timestamp = "2026-10-25T00:30:00Z".parse().unwrap();
    let ns = |moment: Timestamp| i64::try_from(moment.as_nanosecond()).unwrap();
    let old = first - 2400.hours();
    let subjects = [snapshot(1, ns(first)), snapshot(2, ns(first + 1.hour())), snapshot(3, ns(old))];
    let policy = Policy { keep_hourly: Count::AtMost(2), ..Policy::default() };
    let kept = kept(&policy, &subjects, &Terms { zone: berlin, ..terms(Duration::ZERO) });
    assert_eq!(kept, BTreeSet::from([id(1), id(2)]));
}

#[test]
fn weeks_are_iso_weeks_and_quarters_begin_in_january_april_july_october() {
    let at = |text: &str| i64::try_from(text.parse::<Timestamp>().unwrap().as_nanosecond()).unwrap();
    let subjects = ["2027-01-03T12:00:00Z", "2026-12-28T12:00:00Z", "2026-10-01T00:00:00Z", "2026-09-30T23:59:59Z"];
    let subjects: Vec<Subject> = (0..).zip(subjects).map(|(number, time)| snapshot(number, at(time))).collect();
    let terms = Terms { now_ns: at("2027-02-01T00:00:00Z"), ..terms(Duration::ZERO) };
    let weekly = Policy { keep_weekly: Count::AtMost(3), ..Policy::default() };
    let told = reasons(&weekly, &subjects, &terms);
    assert_eq!(
        told,
        ["weekly snapshot 2026-W53", "-", "weekly snapshot 2026-W40", "oldest, weekly snapshots are not complete yet"]
    );
    let quarterly = Policy { keep_quarterly: Count::AtMost(3), ..Policy::default() };
    let told = reasons(&quarterly, &subjects, &terms);
    assert_eq!(told, ["quarterly snapshot 2027-Q1", "quarterly snapshot 2026-Q4", "-", "quarterly snapshot 2026-Q3"]);
}

#[test]
fn groups_are_judged_apart() {
    let mut subjects = at_hours(&[1, 2, 3, 4]);
    subjects[1].host = "db".into();
    subjects[2].paths = vec![b"/etc".to_vec()];
    subjects[3].tags = vec!["b".into(), "a".into()];
    let last = Policy { keep_last: Count::AtMost(1), ..Policy::default() };
    let by = |fields: &[GroupBy]| Policy { group_by: fields.iter().copied().collect(), ..last.clone() };
    let count = |policy: &Policy| kept(policy, &subjects, &terms(Duration::ZERO)).len();
    assert_eq!(count(&by(&[])), 1);
    assert_eq!(count(&by(&[GroupBy::Host])), 2);
    assert_eq!(count(&by(&[GroupBy::Host, GroupBy::Paths])), 3);
    assert_eq!(count(&by(&[GroupBy::Host, GroupBy::Paths, GroupBy::Tags])), 4);
    let groups = decide(&by(&[GroupBy::Tags]), &subjects, &terms(Duration::ZERO));
    assert_eq!(groups[1].key.tags, Some(vec!["a".to_owned(), "b".to_owned()]));
    assert_eq!(groups[1].key.host, None);
}

#[test]
fn no_policy_empties_a_group() {
    let policy = Policy { keep_tags: vec![BTreeSet::from(["nobody has it".into()])], ..Policy::default() };
    assert_eq!(reasons(&policy, &at_hours(&[1, 2, 3]), &terms(Duration::ZERO)), ["newest of its group", "-", "-"]);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let refused = |policy: Policy| policy.decide(at_hours(&[1]), &terms(Duration::ZERO)).unwrap_err();
    assert_eq!(refused(Policy::default()), PolicyError::Empty);
    let grouped = Policy { group_by: BTreeSet::from([GroupBy::Host]), ..Policy::default() };
    assert!(grouped.is_empty(), "grouping alone keeps nothing");
    assert_eq!(refused(Policy { keep_tags: vec![BTreeSet::new()], ..Policy::default() }), PolicyError::NoTags);
    for bad in ["", "abc", "ABCD", "xyzw", &"a".repeat(65)] {
        let policy = Policy { keep_ids: vec![bad.into()], ..Policy::default() };
        assert!(matches!(refused(policy), PolicyError::Id(_)), "{bad}");
    }
    for bad in ["", "7", "d", "d7", "7x", "0d", "1d1d", "1h1d", "-1d", "1.5d", "99999999999d", "1 d", "1dä", "é"] {
        assert!(bad.parse::<Within>().is_err(), "{bad}");
    }
    for good in ["7d", "1y2m3w4d5h", "100000y"] {
        assert_eq!(good.parse::<Within>().unwrap().to_string(), good);
    }
    assert_eq!("-1".parse(), Ok(Count::Unlimited));
    assert!("-2".parse::<Count>().is_err() && "".parse::<Count>().is_err());
}

#[test]
fn a_span_longer_than_time_itself_keeps_everything() {
    let policy = Policy { keep_within: within("100000y"), ..Policy::default() };
    assert_eq!(kept_hours(&policy, &[1, 2000, 200_000]), [1, 2000, 200_000]);
}

#[test]
fn a_policy_reads_back_what_it_writes_and_refuses_unknown_fields() {
    let text = r#"{"keep_last": 3, "keep_daily": "unlimited", "keep_within": "1y6m", "keep_tags": [["a", "b"]],
                   "group_by": ["host", "job"]}"#;
    let policy: Policy = serde_json::from_str(text).unwrap();
    assert_eq!((policy.keep_last, policy.keep_daily), (Count::AtMost(3), Count::Unlimited));
    assert_eq!(serde_json::from_str::<Policy>(&serde_json::to_string(&policy).unwrap()).unwrap(), policy);
    for bad in [r#"{"keep_dayly": 3}"#, r#"{"keep_last": -3}"#, r#"{"keep_within": "3"}"#, r#"{"group_by": ["day"]}"#] {
        assert!(serde_json::from_str::<Policy>(bad).is_err(), "{bad}");
    }
}

#[test]
fn ten_thousand_snapshots_of_a_stolen_agent_push_nothing_out_before_they_are_old_themselves() {
    let week = Duration::from_hours(7 * 24);
    let policy = Policy {
        keep_last: Count::AtMost(5),
        keep_daily: Count::AtMost(7),
        keep_within: within("3d"),
        group_by: BTreeSet::from([GroupBy::Host]),
        ..Policy::default()
    };
    // The attack comes 12 hours ago; the history before it is one snapshot every 8 hours for a month.
    let history: Vec<Subject> =
        (0..90).map(|n: i64| snapshot(n.unsigned_abs(), NOW_NS - (13 + 8 * n) * HOUR_NS)).collect();
    let flood = |n: u64| snapshot(1000 + n, NOW_NS - 12 * HOUR_NS + i64::try_from(n).unwrap() * 1_000_000_000);
    let flooded: Vec<Subject> = history.iter().cloned().chain((0..10_000).map(flood)).collect();
    // Until the flood is a week old, what is kept of the history is what would have been kept without it.
    for hours in [0, 24, 100, 155] {
        let terms = Terms { now_ns: NOW_NS + hours * HOUR_NS, ..terms(week) };
        let (before, after) = (kept(&policy, &history, &terms), kept(&policy, &flooded, &terms));
        assert!(before.is_subset(&after), "after {hours} h");
        assert_eq!(after.len(), before.len() + 10_000);
    }
    // After that it has won the places of `keep_last` and of `keep_within`, but only one a day of `keep_daily`.
    let late = Terms { now_ns: NOW_NS + 200 * HOUR_NS, ..terms(week) };
    let after = kept(&policy, &flooded, &late);
    let survivors = history.iter().filter(|subject| after.contains(&subject.id)).count();
    assert!((6..90).contains(&survivors), "{survivors}");
}

fn arbitrary_subjects() -> impl Strategy<Value = Vec<Subject>> {
    // Crowded hours, sparse years, and moments that several share.
    let age_ns = prop_oneof![0..3 * DAY_NS, 0..60 * DAY_NS, 0..2000 * DAY_NS, (0i64..50).prop_map(|h| h * HOUR_NS)];
    let subject = (age_ns, 0..3u8, 0..8u8, any::<bool>());
    proptest::collection::vec(subject, 0..60).prop_map(|rows| {
        let make = |(number, (age_ns, host, tags, protected)): (u64, (i64, u8, u8, bool))| Subject {
            host: format!("host-{host}"),
            tags: (0..3).filter(|bit| tags >> bit & 1 == 1).map(|bit| format!("tag-{bit}")).collect(),
            protected: protected && number % 7 == 0,
            ..snapshot(number.wrapping_mul(0x9e37_79b9_7f4a_7c15), NOW_NS - age_ns)
        };
        (0..).zip(rows).map(make).collect()
    })
}

fn arbitrary_count() -> impl Strategy<Value = Count> {
    prop_oneof![3 => Just(Count::AtMost(0)), 4 => (1..12u32).prop_map(Count::AtMost), 1 => Just(Count::Unlimited)]
}

fn arbitrary_span() -> impl Strategy<Value = Option<Within>> {
    const TEXTS: [&str; 6] = ["5h", "3d", "2w", "2m", "1y", "1y2m3d4h"];
    prop_oneof![3 => Just(None), 1 => proptest::sample::select(&TEXTS[..]).prop_map(within)]
}

fn arbitrary_policy() -> impl Strategy<Value = Policy> {
    let counts = proptest::array::uniform7(arbitrary_count());
    let spans = proptest::array::uniform7(arbitrary_span());
    let (tagged, by_host) = (any::<bool>(), any::<bool>());
    (counts, spans, tagged, by_host).prop_map(|(counts, spans, tagged, by_host)| Policy {
        keep_last: counts[0],
        keep_hourly: counts[1],
        keep_daily: counts[2],
        keep_weekly: counts[3],
        keep_monthly: counts[4],
        keep_quarterly: counts[5],
        keep_yearly: counts[6],
        keep_within: spans[0],
        keep_within_hourly: spans[1],
        keep_within_daily: spans[2],
        keep_within_weekly: spans[3],
        keep_within_monthly: spans[4],
        keep_within_quarterly: spans[5],
        keep_within_yearly: spans[6],
        keep_tags: if tagged { vec![BTreeSet::from(["tag-0".into(), "tag-1".into()])] } else { Vec::new() },
        // Matches next to nothing; keeps the policy from being empty.
        keep_ids: vec!["0123456789".into()],
        group_by: if by_host { BTreeSet::from([GroupBy::Host]) } else { BTreeSet::new() },
    })
}

fn more(count: Count) -> Count {
    match count {
        Count::AtMost(n) => Count::AtMost(n + 1),
        Count::Unlimited => Count::Unlimited,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn nothing_protected_young_or_from_the_future_is_removed(
        subjects in arbitrary_subjects(), policy in arbitrary_policy(), min_days in 0..100u64, shift in -5 * DAY_NS..5 * DAY_NS,
    ) {
        let terms = Terms { now_ns: NOW_NS + shift, ..terms(Duration::from_hours(24 * min_days)) };
        let kept = kept(&policy, &subjects, &terms);
        for subject in &subjects {
            let age_ns = terms.now_ns - subject.time_ns;
            let young = age_ns < 0 || u128::from(age_ns.unsigned_abs()) < terms.min_retention.as_nanos();
            prop_assert!(kept.contains(&subject.id) || !(young || subject.protected));
        }
        // Every snapshot is decided once.
        let groups = decide(&policy, &subjects, &terms);
        prop_assert_eq!(groups.iter().map(|group| group.decisions.len()).sum::<usize>(), subjects.len());
    }

    #[test]
    fn applying_a_policy_twice_removes_nothing_more(
        subjects in arbitrary_subjects(), policy in arbitrary_policy(), min_days in 0..40u64,
    ) {
        let terms = terms(Duration::from_hours(24 * min_days));
        let first = kept(&policy, &subjects, &terms);
        let rest: Vec<Subject> = subjects.into_iter().filter(|subject| first.contains(&subject.id)).collect();
        prop_assert_eq!(kept(&policy, &rest, &terms), first);
    }

    #[test]
    fn a_policy_that_asks_for_more_keeps_at_least_as_much(
        subjects in arbitrary_subjects(), policy in arbitrary_policy(), which in 0..9usize, min_days in 0..40u64,
    ) {
        let shorter = terms(Duration::from_hours(24 * min_days));
        let mut larger = policy.clone();
        match which {
            0 => larger.keep_last = more(larger.keep_last),
            1 => larger.keep_hourly = more(larger.keep_hourly),
            2 => larger.keep_daily = more(larger.keep_daily),
            3 => larger.keep_weekly = more(larger.keep_weekly),
            4 => larger.keep_monthly = more(larger.keep_monthly),
            5 => larger.keep_quarterly = more(larger.keep_quarterly),
            6 => larger.keep_yearly = more(larger.keep_yearly),
            7 => larger.keep_within = within("2y"),
            _ => larger.keep_within_daily = within("2y"),
        }
        prop_assert!(kept(&policy, &subjects, &shorter).is_subset(&kept(&larger, &subjects, &shorter)));
    }

    #[test]
    fn young_snapshots_decide_nothing_about_older_ones(
        subjects in arbitrary_subjects(), policy in arbitrary_policy(), min_days in 1..100u64,
    ) {
        let terms = terms(Duration::from_hours(24 * min_days));
        let is_young = |subject: &Subject| u128::from((NOW_NS - subject.time_ns).unsigned_abs()) < terms.min_retention.as_nanos();
        let old: Vec<Subject> = subjects.iter().filter(|subject| !is_young(subject)).cloned().collect();
        let young: BTreeSet<SnapshotId> = subjects.iter().filter(|s| is_young(s)).map(|subject| subject.id).collect();
        let expected: BTreeSet<SnapshotId> = kept(&policy, &old, &terms).union(&young).copied().collect();
        prop_assert_eq!(kept(&policy, &subjects, &terms), expected);
    }

    #[test]
    fn a_daily_rule_keeps_exactly_the_newest_of_each_of_the_newest_days_and_the_oldest_if_days_are_left(
        mut subjects in arbitrary_subjects(), days in 1..20usize,
    ) {
        for subject in &mut subjects {
            (subject.protected, subject.host) = (false, "web".into());
        }
        let policy = Policy { keep_daily: Count::AtMost(u32::try_from(days).unwrap()), ..Policy::default() };
        // Another way to the same: a map from day to its newest snapshot.
        let mut newest: BTreeMap<i64, (i64, SnapshotId)> = BTreeMap::new();
        for subject in &subjects {
            let entry = newest.entry(subject.time_ns.div_euclid(DAY_NS)).or_insert((i64::MIN, subject.id));
            *entry = (*entry).max((subject.time_ns, subject.id));
        }
        let mut expected: BTreeSet<SnapshotId> = newest.values().rev().take(days).map(|(_, id)| *id).collect();
        if newest.len() < days {
            expected.extend(subjects.iter().min_by_key(|subject| (subject.time_ns, subject.id)).map(|oldest| oldest.id));
        }
        prop_assert_eq!(kept(&policy, &subjects, &terms(Duration::ZERO)), expected);
    }

    #[test]
    fn the_order_of_the_snapshots_does_not_matter(
        subjects in arbitrary_subjects(), policy in arbitrary_policy(), seed in any::<u64>(),
    ) {
        let terms = terms(Duration::from_hours(30));
        let mut shuffled = subjects.clone();
        shuffled.sort_by_key(|subject| u64::from_be_bytes(subject.id.0[..8].try_into().unwrap()).rotate_left(7) ^ seed);
        prop_assert_eq!(decide(&policy, &subjects, &terms), decide(&policy, &shuffled, &terms));
    }

    #[test]
    fn no_text_makes_the_parsers_fall_over(text in ".{0,12}") {
        let _ = (text.parse::<Within>(), text.parse::<Count>(), text.parse::<GroupBy>());
    }
}
