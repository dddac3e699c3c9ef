use super::record::CachedContentRef;
use super::*;

fn meta(inode: u64) -> Meta {
    Meta { inode, ctime: Timestamp { seconds: 100, nanos: 0 }, ..Meta::default() }
}

const STARTED: Timestamp = Timestamp { seconds: 1000, nanos: 0 };
const IDENTITY: CacheIdentity = CacheIdentity([4; 32]);

// a/ (b, d/ (x), z), c, e/ (f)
fn sample(path: &Path) {
    let mut writer = CacheWriter::create(path, IDENTITY, STARTED);
    for (inode, (depth, directory, name)) in [
        (0, true, "a"),
        (1, false, "b"),
        (1, true, "d"),
        (2, false, "x"),
        (1, false, "z"),
        (0, false, "c"),
        (0, true, "e"),
        (1, false, "f"),
    ]
    .into_iter()
    .enumerate()
    {
        let identity = Identity::of(&meta(inode as u64));
        writer.put(depth, directory, name.as_bytes(), &identity, &[], &[], CachedContentRef::Inline(name.as_bytes()));
    }
    writer.finish().unwrap().publish().unwrap();
}

#[test]
fn the_join_finds_what_is_there_and_skips_what_is_gone_or_new() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("c");
    sample(&path);
    let mut cache = CacheReader::open(&path, IDENTITY).unwrap();
    assert!(cache.enter(b"a", &meta(0)).is_some());
    assert!(cache.lookup(b"a-new", &meta(9)).is_none());
    assert!(cache.enter(b"c-new", &meta(9)).is_none());
    assert!(cache.enter(b"deeper", &meta(9)).is_none());
    assert!(cache.lookup(b"x", &meta(3)).is_none());
    cache.leave();
    cache.leave();
    let z = cache.lookup(b"z", &meta(4)).unwrap();
    assert_eq!(z.content, CachedContent::Inline(b"z".to_vec()));
    cache.leave();
    assert!(cache.lookup(b"c", &meta(5)).is_some());
    assert!(cache.lookup(b"e", &meta(6)).is_none(), "a directory is no file");
    assert!(cache.enter(b"g", &meta(6)).is_none());
    cache.leave();
    cache.leave();
}

#[test]
fn a_damaged_short_or_foreign_cache_is_ignored() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("c");
    sample(&path);
    let good = std::fs::read(&path).unwrap();
    assert!(CacheReader::open(&path, CacheIdentity([5; 32])).is_none());
    for i in 0..good.len() {
        let mut bad = good.clone();
        bad[i] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        assert!(CacheReader::open(&path, IDENTITY).is_none(), "byte {i}");
        std::fs::write(&path, &good[..i]).unwrap();
        assert!(CacheReader::open(&path, IDENTITY).is_none(), "cut at {i}");
    }
    assert!(CacheReader::open(&temp.path().join("none"), IDENTITY).is_none());
}

#[test]
fn s54_a_record_counts_only_if_its_file_had_settled() {
    let at = |seconds, nanos| Meta { ctime: Timestamp { seconds, nanos }, ..meta(1) };
    let same = |meta: &Meta| counts(&Identity::of(meta), meta, STARTED, Ignoring::default());
    assert!(same(&at(997, 999_999_999)));
    assert!(!same(&at(998, 0)));
    assert!(!same(&at(1000, 1)));
    assert!(!same(&at(5000, 0)), "the clock was set back");
    let other = Meta { size: 1, ..at(10, 0) };
    assert!(!counts(&Identity::of(&at(10, 0)), &other, STARTED, Ignoring::default()));
    assert!(counts(&Identity::of(&at(10, 0)), &Meta { device: 77, ..at(10, 0) }, STARTED, Ignoring::default()));
}

#[test]
fn nothing_is_visible_before_it_is_published_and_leftovers_are_removed() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("c");
    sample(&path);
    let before = std::fs::read(&path).unwrap();
    let writer = CacheWriter::create(&path, IDENTITY, STARTED);
    let other = CacheWriter::create(&path, IDENTITY, STARTED);
    drop(writer.finish());
    drop(other);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    std::fs::write(temp.path().join("c.new-0123"), b"left by a killed run").unwrap();
    drop(CacheWriter::create(&path, IDENTITY, STARTED));
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[test]
fn the_clock_of_the_file_system_is_near_the_present() {
    let temp = tempfile::tempdir().unwrap();
    let clock = file_system_clock(temp.path()).unwrap();
    let wall = i64::try_from(strandline_actors::runtime::clock::wall().as_secs()).unwrap();
    assert!((clock.seconds - wall).abs() < 10);
}

#[test]
fn a_cache_that_is_not_published_can_serve_a_second_pass() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("c");
    let mut writer = CacheWriter::create(&path, IDENTITY, STARTED);
    writer.put(0, false, b"a", &Identity::of(&meta(1)), &[], &[], CachedContentRef::Inline(b"x"));
    let pending = writer.finish().unwrap();
    let mut reader = pending.reader().unwrap();
    let second = CacheWriter::create(&path, IDENTITY, STARTED);
    assert!(reader.lookup(b"a", &meta(1)).is_some());
    second.finish().unwrap().publish().unwrap();
    drop(pending);
    assert!(CacheReader::open(&path, IDENTITY).unwrap().lookup(b"a", &meta(1)).is_none());
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1);
}
