package aggregate_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
)

type nameless struct{}

func (nameless) EventType() string { return "" }

type inheriting struct{ opened }

type inheritingPointer struct{ *opened }

type named struct{ opened }

func (named) EventType() string { return "account.named" }

type twin struct{}

func (twin) EventType() string { return "account.opened" }

type byPointer struct{ Cents int64 }

func (*byPointer) EventType() string { return "account.by_pointer" }

type dynamic struct{ names []string }

func (d dynamic) EventType() string { return d.names[0] }

func TestDefine_Mistakes(t *testing.T) {
	t.Parallel()
	ok := aggregate.On(func(*account, opened) {})
	type part = aggregate.Part[account]
	for name, c := range map[string]struct {
		category string
		parts    []part
		says     []string
	}{
		"Category":        {"no good", []part{ok}, []string{`category "no good": ' ' is not allowed`}},
		"NoOns":           {"account", nil, []string{`aggregate "account": no event changes it: add an aggregate.On`}},
		"ZeroPart":        {"account", []part{ok, {}}, []string{"zero Part"}},
		"Interface":       {"account", []part{aggregate.On(func(*account, aggregate.Event) {})}, []string{"On was given the interface aggregate.Event: name the struct of the event"}},
		"NilFold":         {"account", []part{aggregate.On[account, opened](nil), aggregate.OnMeta[account, deposited](nil)}, []string{"On was given a nil function for aggregate_test.opened", "OnMeta was given a nil function for aggregate_test.deposited"}},
		"TwoOns":          {"account", []part{ok, ok}, []string{`two Ons are named "account.opened": aggregate_test.opened and aggregate_test.opened`}},
		"Twins":           {"account", []part{ok, aggregate.On(func(*account, *twin) {})}, []string{`two Ons are named "account.opened": aggregate_test.opened and aggregate_test.twin`}},
		"EmptyName":       {"account", []part{aggregate.On(func(*account, nameless) {})}, []string{`event aggregate_test.nameless: EventType() returns ""`, "event type is empty"}},
		"Inherited":       {"account", []part{aggregate.On(func(*account, inheriting) {})}, []string{`event aggregate_test.inheriting inherits its name "account.opened" from the embedded aggregate_test.opened: give it its own EventType method`}},
		"InheritedByRef":  {"account", []part{aggregate.On(func(*account, *inheriting) {})}, []string{"inherits its name"}},
		"EmbeddedPointer": {"account", []part{aggregate.On(func(*account, inheritingPointer) {})}, []string{"EventType() panics on the zero value"}},
		"Dynamic":         {"account", []part{aggregate.On(func(*account, dynamic) {})}, []string{"EventType() panics on the zero value"}},
		"Snapshot":        {"account", []part{ok, aggregate.SnapshotEvery[account](0)}, []string{"SnapshotEvery(0): want at least 1 event"}},
		"All":             {"no good", []part{aggregate.On(func(*account, nameless) {}), aggregate.On(func(*account, inheriting) {})}, []string{"no good", "nameless", "inheriting"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := aggregate.Define(c.category, c.parts...).Err()
			require.ErrorIs(t, err, eventstore.ErrInvalid)
			for _, says := range c.says {
				require.ErrorContains(t, err, says)
			}
		})
	}
}

func TestDefine_SnapshotOfAStateThatDoesNotSurviveJSON(t *testing.T) {
	t.Parallel()
	type hidden struct{ secret int }
	type ignored struct {
		Kept int
		Lost int `json:"-"`
	}
	type tree struct {
		Children []*tree
		At       time.Time
		ByName   map[string]tree
		ByID     map[int]forgetful
	}
	require.ErrorContains(t, snapshotOf[hidden](), `hidden has the unexported field "secret"`)
	require.ErrorContains(t, snapshotOf[struct{ A []map[string]*hidden }](), `field "A"`)
	require.ErrorContains(t, snapshotOf[ignored](), `leaves the field "Lost" out of JSON`)
	require.ErrorContains(t, snapshotOf[struct{ Any any }](), "is an interface, whose type JSON forgets")
	require.ErrorContains(t, snapshotOf[struct{ F func() }](), "has no form in JSON")
	require.ErrorContains(t, snapshotOf[struct{ M map[float64]int }](), "has keys of type float64")
	require.ErrorContains(t, snapshotOf[map[string]chan int](), "has no form in JSON")
	require.NoError(t, snapshotOf[tree]())
	require.NoError(t, snapshotOf[forgetful](), "it has its own marshaller")
	require.NoError(t, snapshotOf[wider](), "embedding an unexported struct loses nothing")
	require.NoError(t, aggregate.Define("x", aggregate.On(func(*hidden, opened) {})).Err(), "without snapshots any state will do")
}

func snapshotOf[S any]() error {
	return aggregate.Define("x", aggregate.On(func(*S, opened) {}), aggregate.SnapshotEvery[S](10)).Err()
}

func TestDefinition(t *testing.T) {
	t.Parallel()
	require.NoError(t, accounts.Err())
	require.Equal(t, "account", accounts.Category())
	require.Equal(t, []string{"account.opened", "account.deposited", "account.withdrawn"}, accounts.EventTypes())
	require.Equal(t, ann, accounts.Stream("ann"))
	require.NoError(t, aggregate.Define("account", aggregate.On(func(*account, named) {}), aggregate.On(func(*account, opened) {})).Err(), "its own name, although it embeds an event")
}

// Events may be given by value or by pointer, whatever On takes.
func TestDefinition_ValuesAndPointers(t *testing.T) {
	t.Parallel()
	def := aggregate.Define("account",
		aggregate.On(func(a *account, e deposited) { a.Cents += e.Cents }),
		aggregate.On(func(a *account, e *withdrawn) { a.Cents -= e.Cents }),
		aggregate.On(func(a *account, e *byPointer) { a.Cents += e.Cents }))
	require.NoError(t, def.Err())
	r, _ := plain(t, aggregate.Options{})
	_, err := aggregate.Execute(t.Context(), r, def, on("ann", func(account) ([]aggregate.Event, error) {
		return aggregate.Events(deposited{Cents: 1}, &deposited{Cents: 10}, withdrawn{100}, &withdrawn{1000}, &byPointer{10000}), nil
	}))
	require.NoError(t, err)
	state, _, err := aggregate.Load(t.Context(), r, def, "ann")
	require.NoError(t, err)
	require.Equal(t, int64(1+10-100-1000+10000), state.Cents)
}

func TestDefinition_Apply(t *testing.T) {
	t.Parallel()
	enc, err := eventstore.NewEncoding(eventstore.Rename("account.credited", "account.deposited"),
		eventstore.Upcast("account.credited", 1, func(old struct{ Euros int64 }) (deposited, error) { return deposited{Cents: old.Euros * 100}, nil }))
	require.NoError(t, err)
	var state account
	require.NoError(t, accounts.Apply(enc, &state, eventstore.Recorded{Stream: ann, Version: 1, Position: 1, Type: "account.credited", Data: []byte(`{"Euros":5}`)}))
	require.Equal(t, int64(500), state.Cents, "stored under an older name and schema")
	err = accounts.Apply(enc, &state, eventstore.Recorded{Stream: ann, Version: 2, Position: 2, Type: "account.frozen"})
	require.ErrorIs(t, err, eventstore.ErrUnknownType)
	require.ErrorContains(t, err, `aggregate "account" has no On for it`)
	err = accounts.Apply(nil, &state, eventstore.Recorded{Stream: ann, Version: 2, Position: 2, Type: "account.opened", Data: []byte(`{"Owner":5}`)})
	require.ErrorIs(t, err, eventstore.ErrDecode)
	require.Equal(t, account{Cents: 500}, state)
}
