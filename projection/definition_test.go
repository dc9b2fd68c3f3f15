package projection_test

import (
	"context"
	"errors"
	"net/netip"
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

type dated struct {
	time.Time
	Count int
}

type datedByName struct {
	time.Time `json:"at"`
	Count     int
}

type code struct{ Text string }

func (code) MarshalJSON() ([]byte, error) { return []byte("{}"), nil }
func (*code) UnmarshalJSON([]byte) error  { return nil }

type withCode struct {
	code
	Count int
}

type deeper struct {
	Count int
	withCode
}

type withAddress struct {
	*netip.Addr
	Count int
}

type halfOwn struct {
	time.Time
	Count int
}

func (halfOwn) MarshalJSON() ([]byte, error) { return []byte("{}"), nil }

type base struct{ Issued int }

type shadowing struct {
	base
	Issued int
}

type sameName struct {
	A int `json:"B"`
	B int
}

type number int //nolint:unused // it is embedded below

type withNumber struct {
	number
	Count int
}

type withPointer struct {
	*base
	Count int
}

// What follows is fine.

type alone struct{ time.Time }

type wholeOwn struct {
	time.Time
	hidden int
}

func (wholeOwn) MarshalJSON() ([]byte, error) { return []byte("{}"), nil }
func (*wholeOwn) UnmarshalJSON([]byte) error  { return nil }

type Part struct {
	Name string `json:"name,omitempty"`
}

type joined struct {
	base
	*Part
	When    time.Time
	Renamed int `json:"base"`
	Code    code
	_       int
}

type tree struct {
	Value    int
	Children []tree
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
		"embedded time": {
			projection.View("v", projection.On(func(*dated, opened) {})),
			`the row's projection_test.dated has MarshalJSON from the embedded time.Time, which would store nothing of the other fields: give the field a name`,
		},
		"embedded time with a tag": {projection.View("v", projection.On(func(*datedByName, opened) {})), `projection_test.datedByName has MarshalJSON from the embedded time.Time`},
		"embedded marshaller":      {projection.View("v", projection.On(func(*[]withCode, opened) {})), `projection_test.withCode has MarshalJSON from the embedded projection_test.code`},
		"embedded twice":           {projection.View("v", projection.On(func(*deeper, opened) {})), `has MarshalJSON from the embedded projection_test.withCode`},
		"embedded text":            {projection.View("v", projection.On(func(*withAddress, opened) {})), `projection_test.withAddress has MarshalText from the embedded *netip.Addr`},
		"half a marshaller":        {projection.View("v", projection.On(func(*halfOwn, opened) {})), `projection_test.halfOwn has UnmarshalJSON from the embedded time.Time`},
		"shadowed field":           {projection.View("v", projection.On(func(*shadowing, opened) {})), `the row's fields projection_test.shadowing.base.Issued and projection_test.shadowing.Issued would both be stored as "Issued"`},
		"one name twice":           {projection.View("v", projection.On(func(*sameName, opened) {})), `the row's fields projection_test.sameName.A and projection_test.sameName.B would both be stored as "B"`},
		"embedded number":          {projection.View("v", projection.On(func(*withNumber, opened) {})), `the row's field projection_test.withNumber.number is unexported`},
		"embedded pointer":         {projection.View("v", projection.On(func(*withPointer, opened) {})), `the row's field projection_test.withPointer.base is unexported`},
		"channel":                  {projection.View("v", projection.On(func(*chan int, opened) {})), `cannot be stored as JSON`},
		"sql no handlers":          {projection.SQL("v"), `it has no handlers: add projection.OnSQL`},
		"sql bad name":             {projection.SQL("v/w", projection.OnSQL(noop)), `projection name "v/w"`},
		"sql two handlers":         {projection.SQL("v", projection.OnSQL(noop), projection.OnSQL(noop)), `event type "account.opened" has two handlers`},
		"sql nil handler":          {projection.SQL("v", projection.OnSQL[opened](nil)), `the handler of event type "account.opened" is nil`},
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
	require.NoError(t, projection.View("rows", projection.On(func(*alone, opened) {})).Err())
	require.NoError(t, projection.View("rows", projection.On(func(*wholeOwn, opened) {})).Err())
	require.NoError(t, projection.View("rows", projection.On(func(*joined, opened) {})).Err())
	require.NoError(t, projection.View("rows", projection.On(func(*tree, opened) {})).Err())
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
