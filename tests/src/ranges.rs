//! Ascending lists of half-open byte ranges.

use std::ops::Range;

/// What either list covers. Both lists ascend.
pub fn union(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all: Vec<_> = a.iter().chain(b).cloned().collect();
    all.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in all {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// What `a` covers and `b` does not. Both lists ascend.
pub fn subtract(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut others = b.iter().peekable();
    for range in a {
        let mut at = range.start;
        while let Some(other) = others.peek().filter(|other| other.start < range.end) {
            if at < other.start {
                rest.push(at..other.start);
            }
            at = at.max(other.end);
            if other.end > range.end {
                break;
            }
            others.next();
        }
        if at < range.end {
            rest.push(at..range.end);
        }
    }
    rest
}

/// For people: the first ranges, how many there are, and how much they cover.
pub fn text(ranges: &[Range<u64>]) -> String {
    let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let shown: Vec<_> = ranges.iter().take(4).map(|range| format!("{}..{}", range.start, range.end)).collect();
    let more = if ranges.len() > shown.len() { ", …" } else { "" };
    format!("{}{more} ({} ranges, {bytes} bytes)", shown.join(", "), ranges.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_subtract_and_join() {
        assert_eq!(subtract(&[0..10, 20..30], &[2..4, 8..22, 29..50]), [0..2, 4..8, 22..29]);
        assert_eq!(subtract(&[Range { start: 0, end: 100 }], &[]), [Range { start: 0, end: 100 }]);
        assert_eq!(subtract(&[5..6, 7..8], &[Range { start: 0, end: 9 }]), []);
        assert_eq!(union(&[0..10, 20..30], &[5..12, 30..31, 40..41]), [0..12, 20..31, 40..41]);
    }
}
