//! A policy as it is written down: counts, spans, groups. Written and read as text by `serde` (in formats that describe
//! themselves, such as TOML and JSON); unknown fields are errors.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use jiff::{Span, Zoned};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Fewest digits of an id that a policy may name.
const ID_DIGITS_MIN: usize = 4;
/// Most of each unit of a span: more than any history is long, less than any overflow.
const UNITS_MAX: u32 = 100_000;

/// Why a policy cannot be used, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// It would keep nothing.
    #[error(
        "the policy keeps nothing: say what to keep, for example --keep-daily 7 --keep-weekly 5; nothing was removed"
    )]
    Empty,
    /// Not a number of snapshots.
    #[error("`{0}` is not a number of snapshots: write a whole number, or unlimited")]
    Count(String),
    /// Not a span.
    #[error("`{0}` is not a time span such as 30d, 6m or 1y6m12h (years, months, weeks, days, hours)")]
    Within(String),
    /// Not something to group by.
    #[error("`{0}` is nothing to group by: use host, job, paths, tags")]
    GroupBy(String),
    /// An empty set of tags would keep everything.
    #[error("a set of tags to keep is empty; nothing was removed")]
    NoTags,
    /// Not the beginning of an id.
    #[error("`{0}` is not the beginning of a snapshot id: give at least 4 of its lower-case hexadecimal digits")]
    Id(String),
}

/// What to keep. Nothing by default, grouped by nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// The newest so many.
    pub keep_last: Count,
    /// One of each of so many hours that have a snapshot.
    pub keep_hourly: Count,
    /// One of each of so many days.
    pub keep_daily: Count,
    /// One of each of so many weeks, which begin on Mondays (ISO 8601).
    pub keep_weekly: Count,
    /// One of each of so many months.
    pub keep_monthly: Count,
    /// One of each of so many quarters.
    pub keep_quarterly: Count,
    /// One of each of so many years.
    pub keep_yearly: Count,
    /// All that are not older than this, seen from the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_within: Option<Within>,
    /// One of each hour that is not longer ago.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_within_hourly: Option<Within>,
    /// One of each day.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_within_daily: Option<Within>,
    /// One of each week.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_within_weekly: Option<Within>,
    /// One of each month.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_within_monthly: Option<Within>,
    /// One of each quarter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_within_quarterly: Option<Within>,
    /// One of each year.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_within_yearly: Option<Within>,
    /// All that have all tags of one of these sets; no set is empty.
    pub keep_tags: Vec<BTreeSet<String>>,
    /// All whose ids begin so; at least 4 lower-case hexadecimal digits each.
    pub keep_ids: Vec<String>,
    /// The policy is applied to each group of snapshots that have all of these in common.
    pub group_by: BTreeSet<GroupBy>,
}

impl Policy {
    /// Whether it would keep nothing. Such a policy is a mistake, and is refused.
    pub fn is_empty(&self) -> bool {
        self.keep_last.is_none()
            && self.counts().iter().all(|(_, count)| count.is_none())
            && self.keep_within.is_none()
            && self.spans().iter().all(|(_, span)| span.is_none())
            && self.keep_tags.is_empty()
            && self.keep_ids.is_empty()
    }

    /// Refuses what cannot be meant.
    pub fn check(&self) -> Result<(), PolicyError> {
        if self.is_empty() {
            return Err(PolicyError::Empty);
        }
        if self.keep_tags.iter().any(BTreeSet::is_empty) {
            return Err(PolicyError::NoTags);
        }
        let is_prefix = |id: &str| {
            (ID_DIGITS_MIN..=64).contains(&id.len()) && id.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
        };
        match self.keep_ids.iter().find(|id| !is_prefix(id)) {
            Some(id) => Err(PolicyError::Id(id.chars().take(80).collect())),
            None => Ok(()),
        }
    }

    pub(super) fn counts(&self) -> [(Period, Count); 6] {
        [
            (Period::Hourly, self.keep_hourly),
            (Period::Daily, self.keep_daily),
            (Period::Weekly, self.keep_weekly),
            (Period::Monthly, self.keep_monthly),
            (Period::Quarterly, self.keep_quarterly),
            (Period::Yearly, self.keep_yearly),
        ]
    }

    pub(super) fn spans(&self) -> [(Period, Option<Within>); 6] {
        [
            (Period::Hourly, self.keep_within_hourly),
            (Period::Daily, self.keep_within_daily),
            (Period::Weekly, self.keep_within_weekly),
            (Period::Monthly, self.keep_within_monthly),
            (Period::Quarterly, self.keep_within_quarterly),
            (Period::Yearly, self.keep_within_yearly),
        ]
    }
}

/// A number of snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// So many.
    AtMost(u32),
    /// All.
    Unlimited,
}

impl Default for Count {
    fn default() -> Self {
        Self::AtMost(0)
    }
}

impl Count {
    /// Whether it is zero.
    pub fn is_none(self) -> bool {
        self == Self::AtMost(0)
    }

    pub(super) fn take_one(&mut self) {
        if let Self::AtMost(left) = self {
            *left = left.saturating_sub(1);
        }
    }
}

impl FromStr for Count {
    type Err = PolicyError;

    /// A number, or `unlimited` (or `-1`, as in restic).
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "unlimited" | "-1" => Ok(Self::Unlimited),
            _ => text.parse().map(Self::AtMost).map_err(|_| PolicyError::Count(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(count) => write!(f, "{count}"),
            Self::Unlimited => f.write_str("unlimited"),
        }
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AtMost(count) => serializer.serialize_u32(*count),
            Self::Unlimited => serializer.serialize_str("unlimited"),
        }
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrText;

        impl de::Visitor<'_> for NumberOrText {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of snapshots, or \"unlimited\"")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Count, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Count, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Count, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(NumberOrText)
    }
}

/// A time span in calendar units: text such as `1y6m`, `30d`, `2w`, `12h`; `m` are months, as in restic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Within {
    years: u32,
    months: u32,
    weeks: u32,
    days: u32,
    hours: u32,
}

impl Within {
    /// The moment that lies so long before `moment`, ns since 1970, in its calendar.
    pub(super) fn before(self, moment: &Zoned) -> i64 {
        let span = Span::new()
            .try_years(self.years)
            .and_then(|span| span.try_months(self.months))
            .and_then(|span| span.try_weeks(self.weeks))
            .and_then(|span| span.try_days(self.days))
            .and_then(|span| span.try_hours(self.hours));
        let start = span.and_then(|span| moment.checked_sub(span));
        // What lies before all time keeps everything.
        start.map_or(i64::MIN, |start| i64::try_from(start.timestamp().as_nanosecond()).unwrap_or(i64::MIN))
    }
}

impl FromStr for Within {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let bad = || PolicyError::Within(text.chars().take(80).collect());
        let mut span = Self { years: 0, months: 0, weeks: 0, days: 0, hours: 0 };
        let (mut rest, mut smallest) = (text, "ymwdh");
        while !rest.is_empty() {
            let at = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
            let (digits, unit) = rest.split_at(at);
            let number: u32 = digits.parse().ok().filter(|number| *number <= UNITS_MAX).ok_or_else(bad)?;
            let unit = unit.get(..1).ok_or_else(bad)?;
            // Each unit at most once, from large to small.
            smallest = smallest.split_once(unit).ok_or_else(bad)?.1;
            match unit {
                "y" => span.years = number,
                "m" => span.months = number,
                "w" => span.weeks = number,
                "d" => span.days = number,
                _ => span.hours = number,
            }
            rest = rest.get(at + 1..).unwrap_or_default();
        }
        let nothing = span.units().iter().all(|(number, _)| *number == 0);
        if nothing { Err(bad()) } else { Ok(span) }
    }
}

impl Within {
    fn units(self) -> [(u32, char); 5] {
        [(self.years, 'y'), (self.months, 'm'), (self.weeks, 'w'), (self.days, 'd'), (self.hours, 'h')]
    }
}

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.units().iter().filter(|(number, _)| *number > 0).try_for_each(|(number, unit)| write!(f, "{number}{unit}"))
    }
}

impl Serialize for Within {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Within {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// What groups are made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupBy {
    /// The host label.
    Host,
    /// The job label.
    Job,
    /// The set of paths. Only a key holder can read it.
    Paths,
    /// The set of tags.
    Tags,
}

impl FromStr for GroupBy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "host" => Ok(Self::Host),
            "job" => Ok(Self::Job),
            "path" | "paths" => Ok(Self::Paths),
            "tag" | "tags" => Ok(Self::Tags),
            _ => Err(PolicyError::GroupBy(text.chars().take(80).collect())),
        }
    }
}

/// A calendar period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    /// An hour; the one that a clock set back shows twice counts twice.
    Hourly,
    /// A day.
    Daily,
    /// A week, Monday to Sunday.
    Weekly,
    /// A month.
    Monthly,
    /// Three months.
    Quarterly,
    /// A year.
    Yearly,
}

impl Period {
    /// Which period of its kind a moment lies in: equal for equal periods only.
    pub(super) fn bucket(self, moment: &Zoned) -> (i64, i64) {
        let (year, month) = (i64::from(moment.year()), i64::from(moment.month()));
        let day = year * 1000 + i64::from(moment.day_of_year());
        match self {
            Self::Hourly => (day * 24 + i64::from(moment.hour()), i64::from(moment.offset().seconds())),
            Self::Daily => (day, 0),
            Self::Weekly => {
                let week = moment.date().iso_week_date();
                (i64::from(week.year()), i64::from(week.week()))
            }
            Self::Monthly => (year, month),
            Self::Quarterly => (year, (month - 1) / 3),
            Self::Yearly => (year, 0),
        }
    }

    /// The period's name for people: `2026-11-24 15h`, `2026-11-24`, `2026-W48`, `2026-11`, `2026-Q4`, `2026`.
    pub(super) fn name(self, moment: &Zoned) -> String {
        let (year, month, day) = (moment.year(), moment.month(), moment.day());
        match self {
            Self::Hourly => format!("{year:04}-{month:02}-{day:02} {:02}h", moment.hour()),
            Self::Daily => format!("{year:04}-{month:02}-{day:02}"),
            Self::Weekly => {
                let week = moment.date().iso_week_date();
                format!("{:04}-W{:02}", week.year(), week.week())
            }
            Self::Monthly => format!("{year:04}-{month:02}"),
            Self::Quarterly => format!("{year:04}-Q{}", (month - 1) / 3 + 1),
            Self::Yearly => format!("{year:04}"),
        }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Quarterly => "quarterly",
            Self::Yearly => "yearly",
        })
    }
}
