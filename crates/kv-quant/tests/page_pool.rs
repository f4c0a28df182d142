//! The books alone, as an engine with its cache on a device uses them.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

use kv_quant::{AppendSlots, CacheFormat, CacheLayout, PageCopy, PagePool, PoolError, ScaleType};

#[test]
fn a_refused_device_append_is_taken_back() {
    let mut pool = PagePool::new(6, 4, 100);
    let mut append = AppendSlots::default();
    let (parent, other) = (pool.allocate(), pool.allocate());
    pool.append(parent, 6, &mut append).unwrap();
    let child = pool.fork(parent, 6).unwrap();
    pool.append_batch(&[(child, 3), (other, 1), (parent, 0)], &mut append).unwrap();
    assert_eq!(append.copies(), [PageCopy { src: 1, dst: 2 }]);
    assert_eq!(append.slots(), [10, 11, 12, 16]);
    pool.undo_append(&mut append).unwrap();
    assert_eq!((append.slots(), append.copies()), (&[][..], &[][..]));
    assert_eq!(pool.page_row(child).unwrap(), [0, 1]);
    assert_eq!((pool.len(child), pool.len(other)), (Ok(6), Ok(0)));
    assert_eq!((pool.ref_count(1), pool.num_free_pages()), (Some(2), 4));
    // Not twice, and not after another change.
    assert_eq!(pool.undo_append(&mut append), Err(PoolError::StaleAppend));
    pool.append(child, 3, &mut append).unwrap();
    assert_eq!(append.slots(), [10, 11, 12], "the same pages come again");
    pool.allocate();
    assert_eq!(pool.undo_append(&mut append), Err(PoolError::StaleAppend));
    assert_eq!(pool.len(child), Ok(9));
}

#[test]
fn handles_and_appends_of_another_pool_are_refused() {
    let (mut ours, mut theirs) = (PagePool::new(4, 4, 1), PagePool::new(4, 4, 1));
    let (mine, stranger) = (ours.allocate(), theirs.allocate());
    let mut append = AppendSlots::default();
    assert_eq!(ours.len(stranger), Err(PoolError::UnknownSequence(stranger)));
    ours.append(mine, 2, &mut append).unwrap();
    theirs.append(stranger, 2, &mut AppendSlots::default()).unwrap();
    assert_eq!(theirs.undo_append(&mut append), Err(PoolError::StaleAppend));
    assert_eq!(ours.undo_append(&mut AppendSlots::default()), Err(PoolError::StaleAppend));
    // A place handed out again is another sequence.
    ours.free(mine).unwrap();
    let next = ours.allocate();
    assert_ne!(mine, next);
    assert_eq!(ours.free(mine), Err(PoolError::UnknownSequence(mine)));
    assert_eq!(ours.len(next), Ok(0));
}

#[test]
fn two_forks_of_one_page_in_one_batch_copy_once() {
    let mut pool = PagePool::new(3, 4, 1);
    let mut append = AppendSlots::default();
    let parent = pool.allocate();
    pool.append(parent, 2, &mut append).unwrap();
    let child = pool.fork(parent, 2).unwrap();
    pool.append_batch(&[(parent, 1), (child, 1)], &mut append).unwrap();
    assert_eq!(append.copies(), [PageCopy { src: 0, dst: 1 }], "the last of the two keeps the page");
    assert_eq!(append.slots(), [6, 2]);
    // Five more pages are needed for these, and one copy were it still shared; one page is free.
    let grand = pool.fork(child, 3).unwrap();
    let error = pool.append_batch(&[(child, 9), (grand, 9)], &mut append).unwrap_err();
    assert_eq!(error, PoolError::OutOfPages { needed: 2 + 2 + 1, free: 1 });
    assert_eq!((pool.len(child), pool.len(grand), pool.ref_count(0)), (Ok(3), Ok(3), Some(2)));
}

#[test]
fn lengths_stop_at_u32() {
    let mut pool = PagePool::new(2, 65536, 1);
    let mut append = AppendSlots::default();
    let sequence = pool.allocate();
    pool.append(sequence, 5, &mut append).unwrap();
    let want = PoolError::TooLong { sequence, len: 5, num_tokens: u32::MAX };
    assert_eq!(pool.append(sequence, u32::MAX, &mut append), Err(want));
    // The longest of all needs more pages than there are, and says so without trying.
    let want = PoolError::OutOfPages { needed: 65535, free: 1 };
    assert_eq!(pool.append(sequence, u32::MAX - 5, &mut append), Err(want));
    assert_eq!(pool.len(sequence), Ok(5));
}

#[test]
fn page_tables_lengths_and_bytes() {
    let layout = CacheLayout::native(CacheFormat::new(2, 64, 8, 8, ScaleType::F16).unwrap(), 5, 4).unwrap();
    let mut pool = PagePool::for_layout(&layout);
    let mut append = AppendSlots::default();
    let (a, b) = (pool.allocate(), pool.allocate());
    pool.append_batch(&[(a, 9), (b, 0)], &mut append).unwrap();
    assert_eq!((pool.num_free_pages(), pool.free_tokens()), (2, 8));
    assert_eq!(pool.bytes_used(), 3 * layout.bytes_per_page());
    let c = pool.fork(a, 8).unwrap();
    pool.append(c, 1, &mut append).unwrap();
    assert!(append.copies().is_empty(), "a fork at a page's end copies nothing");
    let (mut pages, mut starts, mut lens) = (vec![7], vec![7], vec![7]);
    pool.fill_page_table(&[c, b, a], &mut pages, &mut starts).unwrap();
    pool.fill_lens(&[c, b, a], &mut lens).unwrap();
    assert_eq!((pages.as_slice(), starts.as_slice()), (&[0, 1, 3, 0, 1, 2][..], &[0, 3, 3][..]));
    assert_eq!(lens, [9, 0, 9]);
    pool.free(a).unwrap();
    assert_eq!((pool.num_sequences(), pool.ref_count(0), pool.ref_count(2)), (2, Some(1), Some(0)));
    assert_eq!(pool.ref_count(5), None);
    pool.truncate(c, 0).unwrap();
    assert_eq!((pool.num_free_pages(), pool.bytes_used()), (5, 0));
}
