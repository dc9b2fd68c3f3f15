package projection_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

type reopened struct{ opened }

type renamed struct{ opened }

func (renamed) EventType() string { return "account.renamed" }

type nameless struct{}

func (nameless) EventType() string { return "" }

type hidden struct{ cents int64 }

type untagged struct {
	Cents int64 `json:"-"`
}

type nested struct {
	When  time.Time
	Parts []struct{ inner int }
}

type loose struct{ Any map[string]any }

func TestDefinition_MistakesAreKept(t *testing.T) {
	t.Parallel()
	keepOwner := projection.On(func(b *balance, e opened) { b.Owner = e.Owner })
	noop := func(context.Context, projection.Tx, opened, eventstore.Recorded) error { return nil }
	for name, c := range map[string]struct {
		projection projection.Projection
		want       string
	}{
		"empty name":        {projection.View("", keepOwner), `the projection's name is empty`},
		"bad name":          {projection.View("my view", keepOwner), `projection name "my view": ' ' is not allowed at byte 2`},
		"name as digits":    {projection.View("1st", keepOwner), `'1' is not allowed at byte 0`},
		"no handlers":       {projection.View[balance]("v"), `it has no handlers: add projection.On`},
		"interface":         {projection.View("v", projection.On(func(*balance, projection.Event) {})), `the handler takes the interface projection.Event: give it the event's own type`},
		"two handlers":      {projection.View("v", keepOwner, projection.DeleteOn[balance, opened]()), `event type "account.opened" has two handlers`},
		"value and pointer": {projection.View("v", keepOwner, projection.On(func(*balance, *opened) {})), `event type "account.opened" has two handlers`},
		"inherited name":    {projection.View("v", projection.On(func(*balance, reopened) {})), `event projection_test.reopened has its name "account.opened" from the embedded projection_test.opened`},
		"inherited by pointer": {
			projection.View("v", projection.On(func(*balance, *reopened) {})), `has its name "account.opened" from the embedded`,
		},
		"empty event type": {projection.View("v", projection.On(func(*balance, nameless) {})), `event projection_test.nameless: `},
		"nil fold":         {projection.View("v", projection.On[balance, opened](nil)), `the fold given to projection.On is nil`},
		"nil meta fold":    {projection.View("v", projection.OnMeta[balance, opened](nil)), `the fold given to projection.OnMeta is nil`},
		"nil keys":         {projection.View("v", projection.OnKeyed[balance, opened](nil, nil)), `a function given to projection.OnKeyed is nil`},
		"nil definition":   {projection.Of[balance]("v", nil), `the definition given to projection.Of is nil`},
		"unexported field": {projection.View("v", projection.On(func(*hidden, opened) {})), `the row's field projection_test.hidden.cents is unexported and would not be stored`},
		"field not stored": {projection.View("v", projection.On(func(*untagged, opened) {})), `the row's field projection_test.untagged.Cents is tagged json:"-"`},
		"nested field":     {projection.View("v", projection.On(func(*nested, opened) {})), `projection_test.nested.Parts.inner is unexported`},
		"loose field":      {projection.View("v", projection.On(func(*loose, opened) {})), `the row's projection_test.loose.Any is the interface interface {}`},
		"channel":          {projection.View("v", projection.On(func(*chan int, opened) {})), `cannot be stored as JSON`},
		"sql no handlers":  {projection.SQL("v"), `it has no handlers: add projection.OnSQL`},
		"sql bad name":     {projection.SQL("v/w", projection.OnSQL(noop)), `projection name "v/w"`},
		"sql two handlers": {projection.SQL("v", projection.OnSQL(noop), projection.OnSQL(noop)), `event type "account.opened" has two handlers`},
		"sql nil handler":  {projection.SQL("v", projection.OnSQL[opened](nil)), `the handler of event type "account.opened" is nil`},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.projection.Err()
			require.Error(t, err)
			require.ErrorContains(t, err, c.want)
			require.True(t, errors.Is(err, eventstore.ErrInvalid) || errors.Is(err, eventstore.ErrTooLarge))
			store := memory.New()
			defer store.Close()
			require.Equal(t, err, projection.NewEngine(store, store, projection.Options{}).Add(c.projection))
		})
	}
}

func TestDefinition_AllMistakesAtOnce(t *testing.T) {
	t.Parallel()
	err := projection.View("a b", projection.On(func(*hidden, reopened) {}), projection.On(func(*hidden, nameless) {})).Err()
	require.ErrorContains(t, err, "not allowed at byte 1")
	require.ErrorContains(t, err, "cents is unexported")
	require.ErrorContains(t, err, "from the embedded")
	require.ErrorContains(t, err, "nameless")
}

func TestDefinition_AcceptsWhatIsFine(t *testing.T) {
	t.Parallel()
	require.NoError(t, projection.View("ok-1.x_y",
		projection.On(func(b *balance, e *opened) { b.Owner = e.Owner }),
		projection.On(func(b *balance, e renamed) { b.Owner = e.Owner }),
	).Err())
	require.NoError(t, projection.View("times", projection.On(func(rows *map[string][]time.Time, e opened) {})).Err())
}

func TestEngine_Add_NameTaken(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	e := projection.NewEngine(store, store, projection.Options{})
	require.NoError(t, e.Add(balances()))
	require.ErrorContains(t, e.Add(balances()), `two projections are named "balances"`)
}
