//! What people and programs see: sizes, times, tables, JSON lines, errors.

use std::io::Write;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use zeroize::Zeroizing;

/// Bytes for people, in binary units.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 || unit == "TiB" {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    String::new()
}

/// A time span for people.
pub fn span(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    match seconds {
        0..60 => format!("{:.1} s", elapsed.as_secs_f64()),
        60..3600 => format!("{}:{:02} min", seconds / 60, seconds % 60),
        _ => format!("{}:{:02}:{:02} h", seconds / 3600, seconds / 60 % 60, seconds % 60),
    }
}

/// A moment for people, in this machine's time zone.
pub fn moment(ns: i64) -> String {
    match Timestamp::from_nanosecond(ns.into()) {
        Ok(time) => time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => "?".to_owned(),
    }
}

/// A moment for programs: RFC 3339 in UTC.
pub fn rfc3339(ns: i64) -> String {
    Timestamp::from_nanosecond(ns.into()).map_or_else(|_| String::new(), |time| time.to_string())
}

/// A raw path or name for people and for JSON: UTF-8 as it is, other bytes as `\xNN`, control characters escaped.
pub fn path(raw: &[u8]) -> String {
    let mut text = String::with_capacity(raw.len());
    for piece in raw.utf8_chunks() {
        for c in piece.valid().chars() {
            if c.is_control() || c == '\\' {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
        }
        for byte in piece.invalid() {
            // Writing to a String cannot fail.
            let _ = std::fmt::Write::write_fmt(&mut text, format_args!("\\x{byte:02x}"));
        }
    }
    text
}

/// Rows with a head; columns as wide as their widest cell, numbers are the caller's to align.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(head.get(column).map(|title| title.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    let titles: Vec<String> = head.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&titles).chain(rows) {
        let line: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Prints one JSON object as a line on standard output.
pub fn json_line<T: Serialize>(value: &T) -> anyhow::Result<()> {
    // Some lines hold a recovery key.
    let mut line = Zeroizing::new(Vec::with_capacity(1024));
    serde_json::to_writer(&mut *line, value)?;
    line.push(b'\n');
    print(&line)
}

/// Prints to standard output. A closed pipe (`| head`) ends the program quietly.
pub fn print(bytes: &[u8]) -> anyhow::Result<()> {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => Ok(written?),
    }
}

/// Prints an error on standard error.
pub fn error(json: bool, code: u8, message: &str) {
    let line = if json {
        serde_json::json!({ "message_type": "error", "code": code, "message": message }).to_string()
    } else {
        format!("strand: {message}")
    };
    // There is nowhere left to report to.
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_not_text_are_shown_without_loss() {
        assert_eq!(path("größe".as_bytes()), "größe");
        assert_eq!(path(b"a\xff\nb\\"), "a\\xff\\nb\\\\");
    }

    #[test]
    fn sizes_and_spans_read_well() {
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(span(Duration::from_millis(1500)), "1.5 s");
        assert_eq!(span(Duration::from_secs(61)), "1:01 min");
    }
}
