//! Values that administrators write: repositories, sizes, parts of a repository, settings.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use strandline_actors::machines::retention::{GroupBy, Policy};
use strandline_messages::wire::manage::ScrubSubset;
use strandline_messages::{RepositoryName, TenantName};

use crate::engine::settings::RepositorySettings;

/// A repository as administrators name it: `TENANT/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RepositoryPath {
    /// Its tenant.
    pub tenant: TenantName,
    /// Its name.
    pub name: RepositoryName,
}

impl fmt::Display for RepositoryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.name)
    }
}

impl FromStr for RepositoryPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (tenant, name) =
            text.split_once('/').ok_or("a repository is written TENANT/NAME (a local directory's is local/main)")?;
        let tenant = tenant.parse().map_err(|error| format!("{error}"))?;
        Ok(Self { tenant, name: name.parse().map_err(|error| format!("{error}"))? })
    }
}

impl TryFrom<String> for RepositoryPath {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<RepositoryPath> for String {
    fn from(path: RepositoryPath) -> Self {
        path.to_string()
    }
}

/// A number of bytes: digits, and K, M, G or T (times 1,024 each) with or without `iB` or `B`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(format!("`{text}` is no size: write digits and K, M, G or T, as in 64M")),
    };
    let number: u64 = number.parse().map_err(|_| format!("`{text}` is no size: write digits, as in 64M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is too large"))
}

/// A part of a repository as restic's `--read-data-subset` writes it: `n/t`, `p%`, or a size.
pub fn parse_subset(text: &str) -> Result<ScrubSubset, String> {
    if let Some((part, of)) = text.split_once('/') {
        return match (part.parse::<u32>(), of.parse::<u32>()) {
            (Ok(part), Ok(of)) if 1 <= part && part <= of => Ok(ScrubSubset::Part { part, of }),
            _ => Err(format!("`{text}` is no part: write n/t with n from 1 to t")),
        };
    }
    if let Some(percent) = text.strip_suffix('%') {
        let permille = thousandths(percent).filter(|permille| (1..=1000).contains(permille));
        return permille
            .map(|permille| ScrubSubset::Share { permille })
            .ok_or_else(|| format!("`{text}` is no share: write 0.1% to 100%, with at most one decimal"));
    }
    match parse_size(text)? {
        0 => Err("nothing would be read".to_owned()),
        bytes => Ok(ScrubSubset::Bytes { bytes }),
    }
}

/// `12.5` as 125.
fn thousandths(percent: &str) -> Option<u32> {
    let (whole, tenth) = percent.split_once('.').unwrap_or((percent, "0"));
    let tenth: u32 = if tenth.len() == 1 { tenth.parse().ok()? } else { return None };
    whole.parse::<u32>().ok()?.checked_mul(10)?.checked_add(tenth)
}

/// `settings` with `KEY=VALUE` changed. The error is for people.
pub fn change_setting(settings: &RepositorySettings, key: &str, value: &str) -> Result<RepositorySettings, String> {
    if let Some(rule) = key.strip_prefix("retention.") {
        return change_policy(settings, rule, value);
    }
    if key == "retention" {
        return if value == "none" {
            Ok(RepositorySettings { retention: None, ..settings.clone() })
        } else {
            Err("`retention=none` removes the policy; its rules are set one by one, as in `retention.keep_daily=7`"
                .to_owned())
        };
    }
    let mut object = serde_json::to_value(settings).map_err(|error| error.to_string())?;
    let Some(field) = object.get_mut(key) else {
        let keys: Vec<String> = object.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect();
        return Err(format!("there is no setting `{key}`; there are {}", keys.join(", ")));
    };
    let refused = |why: &dyn fmt::Display| format!("`{key}={value}`: {why}");
    let new = match field {
        Value::Bool(_) => Value::Bool(value.parse().map_err(|_| refused(&"write true or false"))?),
        Value::Number(_) => Value::from(parse_size(value).map_err(|why| refused(&why))?),
        _ => Value::String(value.to_owned()),
    };
    *field = new;
    let changed: RepositorySettings = serde_json::from_value(object).map_err(|error| refused(&error))?;
    if changed.compact_below_percent > 100 {
        return Err(refused(&"at most 100"));
    }
    Ok(changed)
}

/// `settings` with one rule of the policy changed. Lists are written with commas, several sets of tags with semicolons.
fn change_policy(settings: &RepositorySettings, rule: &str, value: &str) -> Result<RepositorySettings, String> {
    let default = || Policy { group_by: [GroupBy::Host, GroupBy::Job].into(), ..Policy::default() };
    let policy = settings.retention.as_deref().cloned().unwrap_or_else(default);
    let mut object = serde_json::to_value(policy).map_err(|error| error.to_string())?;
    let list = |text: &str, separator: char| -> Vec<String> {
        text.split(separator).filter(|item| !item.is_empty()).map(str::to_owned).collect()
    };
    let new = match rule {
        "keep_ids" | "group_by" => Value::from(list(value, ',')),
        "keep_tags" => Value::from(list(value, ';').iter().map(|set| Value::from(list(set, ','))).collect::<Vec<_>>()),
        _ => value.parse::<u32>().map_or_else(|_| Value::from(value), Value::from),
    };
    if let Some(rules) = object.as_object_mut() {
        rules.insert(rule.to_owned(), new);
    }
    let policy: Policy =
        serde_json::from_value(object).map_err(|error| format!("`retention.{rule}={value}`: {error}"))?;
    if policy.group_by.contains(&GroupBy::Paths) {
        return Err("a server cannot see paths: group by host, job or tags".to_owned());
    }
    Ok(RepositorySettings { retention: Some(Box::new(policy)), ..settings.clone() })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn sizes_and_parts_are_read_as_people_write_them() {
        for (text, size) in [("0", 0), ("7", 7), ("64M", 64 << 20), ("64MiB", 64 << 20), ("1kB", 1024), ("2T", 2 << 40)]
        {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for bad in ["", "M", "1X", "-1", "1.5M", "99999999999999999999", "99999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_subset("2/7"), Ok(ScrubSubset::Part { part: 2, of: 7 }));
        assert_eq!(parse_subset("12.5%"), Ok(ScrubSubset::Share { permille: 125 }));
        assert_eq!(parse_subset("100%"), Ok(ScrubSubset::Share { permille: 1000 }));
        assert_eq!(parse_subset("1G"), Ok(ScrubSubset::Bytes { bytes: 1 << 30 }));
        for bad in ["0/3", "4/3", "1/0", "0%", "101%", "1.23%", "0", "x"] {
            assert!(parse_subset(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn settings_are_changed_by_their_names_and_unknown_ones_are_refused() {
        let settings = RepositorySettings::default();
        let changed = change_setting(&settings, "undelete", "2days").unwrap();
        assert_eq!(changed.undelete, Duration::from_hours(48));
        assert_eq!(RepositorySettings { undelete: settings.undelete, ..changed }, settings);
        assert!(!change_setting(&settings, "agents_may_delete", "false").unwrap().agents_may_delete);
        let limited = change_setting(&settings, "scrub_bytes_per_second", "1M").unwrap();
        assert_eq!(limited.scrub_bytes_per_second, 1 << 20);
        let unknown = change_setting(&settings, "colour", "red").unwrap_err();
        assert!(unknown.contains("min_retention"), "{unknown}");
        for (key, value) in [
            ("undelete", "soon"),
            ("agents_may_delete", "maybe"),
            ("compact_below_percent", "101"),
            ("compact_below_percent", "300"),
            ("scrub_bytes_per_second", "fast"),
        ] {
            assert!(change_setting(&settings, key, value).is_err(), "{key}={value}");
        }
    }

    #[test]
    fn a_policy_is_written_rule_by_rule() {
        let settings = RepositorySettings::default();
        let settings = change_setting(&settings, "retention.keep_daily", "7").unwrap();
        let settings = change_setting(&settings, "retention.keep_within", "30d").unwrap();
        let settings = change_setting(&settings, "retention.keep_tags", "a,b;c").unwrap();
        let policy = settings.retention.clone().unwrap();
        policy.check().unwrap();
        assert_eq!(policy.keep_daily, "7".parse().unwrap());
        assert_eq!(policy.keep_tags.len(), 2);
        assert_eq!(policy.group_by, [GroupBy::Host, GroupBy::Job].into());
        for (key, value) in [
            ("retention.keep_daily", "many"),
            ("retention.keep_forever", "1"),
            ("retention.group_by", "host,paths"),
            ("retention", "keep_daily"),
        ] {
            assert!(change_setting(&settings, key, value).is_err(), "{key}={value}");
        }
        assert_eq!(change_setting(&settings, "retention", "none").unwrap().retention, None);
    }

    #[test]
    fn a_repository_is_named_by_tenant_and_name() {
        let path: RepositoryPath = "acme/laptop".parse().unwrap();
        assert_eq!((path.tenant.as_str(), path.name.as_str()), ("acme", "laptop"));
        for bad in ["laptop", "acme/", "/laptop", "../x", "a/b/c"] {
            assert!(bad.parse::<RepositoryPath>().is_err(), "{bad}");
        }
    }
}
