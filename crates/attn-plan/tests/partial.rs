//! Properties of the partial-state algebra.

use attn_plan::{Partial, SoftmaxState};
use proptest::prelude::*;

fn partials() -> impl Strategy<Value = Partial> {
    prop_oneof![
        1 => Just(Partial::empty(4)),
        4 => (-80f32..80.0, 1f32..4000.0, prop::collection::vec(-3f32..3.0, 4)).prop_map(|(m, l, v)| Partial {
            state: SoftmaxState { m, l },
            o: v.iter().map(|x| x * l).collect(),
        }),
    ]
}

fn merged(a: &Partial, b: &Partial) -> Partial {
    let mut c = a.clone();
    c.merge(b);
    c
}

/// `docs/merge-math.md`, section 4: a merge costs 10 units of 2^-24 for parts of up to 4000 tokens, and two orders of
/// three parts are four merges.
const TOLERANCE: f32 = 4.0 * 10.0 / 16_777_216.0;

fn assert_close(a: &Partial, b: &Partial) -> Result<(), TestCaseError> {
    prop_assert_eq!(a.state.m, b.state.m);
    prop_assert!((a.state.l - b.state.l).abs() <= TOLERANCE * a.state.l.max(b.state.l));
    for (x, y) in a.o.iter().zip(&b.o) {
        // |o| <= 3 l for every state made above.
        prop_assert!((x - y).abs() <= TOLERANCE * 3.0 * a.state.l.max(1.0), "{x} {y}");
    }
    Ok(())
}

proptest! {
    #[test]
    fn merge_is_associative_within_the_bound(a in partials(), b in partials(), c in partials()) {
        assert_close(&merged(&merged(&a, &b), &c), &merged(&a, &merged(&b, &c)))?;
    }

    #[test]
    fn merge_commutes(a in partials(), b in partials()) {
        assert_close(&merged(&a, &b), &merged(&b, &a))?;
    }

    #[test]
    fn empty_is_the_identity_to_the_bit(a in partials()) {
        prop_assert_eq!(&merged(&a, &Partial::empty(4)), &a);
        prop_assert_eq!(&merged(&Partial::empty(4), &a), &a);
    }

    #[test]
    fn nothing_becomes_nan(a in partials(), b in partials()) {
        let c = merged(&a, &b);
        prop_assert!(!c.state.m.is_nan() && !c.state.l.is_nan() && !c.state.lse().is_nan());
        prop_assert!(c.output().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn empty_merged_with_empty_is_empty() {
    let c = merged(&Partial::empty(4), &Partial::empty(4));
    assert_eq!(c, Partial::empty(4));
    assert_eq!(c.output(), vec![0.0; 4]);
    assert_eq!(c.state.lse(), f32::NEG_INFINITY);
}

#[test]
fn a_sink_takes_its_share_and_no_value() {
    let c = merged(&Partial::token(0.0, &[2.0; 4]), &Partial::sink(0.0, 4));
    assert_eq!(c.output(), vec![1.0; 4]);
    assert!((c.state.lse() - 2f32.ln()).abs() < 1e-6);
}
