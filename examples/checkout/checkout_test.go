package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

// TestMain lets the test binary be the program itself, so that it can die.
func TestMain(m *testing.M) {
	if os.Getenv("CHECKOUT_PROGRAM") != "" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

const day = 24 * time.Hour

func placed(card string) OrderPlaced {
	return OrderPlaced{SKU: "lamp", Cents: 4900, Card: card, Name: "Ann", Email: "ann@example.com"}
}

// world is what the shop sees of the world outside: the real gateway, with its
// ledger in memory, behind real HTTP, and a note of the mails.
type world struct {
	*gateway
	shop Shop

	mailing sync.Mutex
	mails   map[string]string // subjects by key
}

func newWorld(t testing.TB, between ...func(http.Handler) http.Handler) *world {
	w := &world{gateway: &gateway{out: io.Discard}, mails: map[string]string{}}
	var handler http.Handler = w.gateway
	for _, wrap := range between {
		handler = wrap(handler)
	}
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	w.shop = Shop{Payments: Payments{URL: server.URL}, Mail: w}
	return w
}

// Send notes a mail; one of the same key is the same mail.
func (w *world) Send(_ context.Context, to OrderPlaced, subject, key string) error {
	w.mailing.Lock()
	defer w.mailing.Unlock()
	w.mails[key] = to.Name + ": " + subject
	return nil
}

func (w *world) sent() []string {
	w.mailing.Lock()
	defer w.mailing.Unlock()
	return slices.Sorted(maps.Values(w.mails))
}

// booked is the ledger, in short.
func (w *world) booked() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []string
	for _, e := range w.ledger {
		all = append(all, fmt.Sprintf("%s %s %d", e.Order, e.Kind, e.Cents))
	}
	return all
}

// tell begins a story with one lamp in stock.
func tell(t *testing.T, w *world) *sagatest.Spec {
	return sagatest.For(t, checkout(w.shop)).Given("stock", "lamp", Stocked{1})
}

func TestCheckout_Completes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tell(t, w).
		When("order", "o1", placed("golden")).
		Waiting("o1", "order.shipped").
		Published("o1", "stage", "waiting for the parcel").
		Advance(3*day).
		When("order", "o1", OrderShipped{"parcel-1"}).
		Completed("o1", Receipt{"charge-1", "parcel-1"}).
		Published("o1", "stage", "shipped").
		Happened("stock", "lamp", Reserved{"o1"}).
		Happened("order", "o1", OrderPaid{"charge-1"})
	require.Equal(t, []string{"o1 charge 4900"}, w.booked())
	require.Equal(t, []string{"Ann: We have your order", "Ann: Your parcel is on its way"}, w.sent())
}

func TestCheckout_SoldOut(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	sagatest.For(t, checkout(w.shop)).
		When("order", "o1", placed("golden")).
		Failed("o1", nil).
		Happened("stock", "lamp")
	require.Empty(t, w.booked())
}

func TestCheckout_Declined(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tell(t, w).
		When("order", "o1", placed("empty")).
		Failed("o1", ErrDeclined, "refund", "release").
		Happened("stock", "lamp", Reserved{"o1"}, Released{"o1"}).
		Happened("order", "o1")
	require.Equal(t, []string{"o1 refund 0"}, w.booked())
	require.Empty(t, w.sent())
}

func TestCheckout_NeverShipped(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tell(t, w).
		When("order", "o1", placed("golden")).
		Advance(14*day-time.Second).
		Waiting("o1", "order.shipped").
		Advance(time.Second).
		Failed("o1", ErrNeverShipped, "refund", "release").
		Happened("stock", "lamp", Reserved{"o1"}, Released{"o1"}).
		Happened("order", "o1", OrderPaid{"charge-1"}, OrderCalledOff{})
	require.Equal(t, []string{"o1 charge 4900", "o1 refund 4900"}, w.booked())
}

func TestCheckout_Cancelled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tell(t, w).
		When("order", "o1", placed("golden")).
		Cancel("o1", "changed my mind").
		Cancelled("o1", "refund", "release").
		Happened("stock", "lamp", Reserved{"o1"}, Released{"o1"}).
		Happened("order", "o1", OrderPaid{"charge-1"}, OrderCalledOff{})
	require.Equal(t, []string{"o1 charge 4900", "o1 refund 4900"}, w.booked())
}

// TestCheckout_CancelledTooLate: before the run hears that it is to be
// cancelled, the parcel is handed over. The order is not called off, and the
// customer pays for what she gets.
func TestCheckout_CancelledTooLate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx, store := t.Context(), memory.New()
	checkouts := checkout(w.shop)
	with := func(do func(app *deed.App), parts ...deed.Part) {
		app, err := deed.Start(ctx, eventstore.Opened(store), append(parts, stocks, orders)...)
		require.NoError(t, err)
		do(app)
		require.NoError(t, app.Stop(ctx))
	}
	with(func(app *deed.App) {
		_, err := deed.Execute(ctx, app, stocks, Fill{"lamp", 1})
		require.NoError(t, err)
		_, err = deed.Execute(ctx, app, orders, Place{"o1", placed("golden")})
		require.NoError(t, err)
		require.NoError(t, app.Settle(ctx))
	}, checkouts)
	with(func(app *deed.App) { // nobody here runs checkouts
		_, err := deed.Execute(ctx, app, orders, Ship{"o1", "parcel-1"})
		require.NoError(t, err)
		require.NoError(t, app.Sagas().Cancel(ctx, "checkout", "o1", "changed my mind"))
	})
	with(func(app *deed.App) {
		receipt, err := saga.Wait(ctx, app, checkouts, "o1")
		require.NoError(t, err)
		require.Equal(t, Receipt{"charge-1", "parcel-1"}, receipt)
		order, _, err := deed.Load(ctx, app, orders, "o1")
		require.NoError(t, err)
		require.Equal(t, Order{Placed: true, Paid: true, Shipped: true}, order)
		told, err := app.Sagas().Timeline(ctx, "checkout", "o1")
		require.NoError(t, err)
		require.True(t, slices.ContainsFunc(told.Steps, func(step saga.StepInfo) bool {
			return step.Text == `execute "call off"` && step.Status == saga.StepFailed
		}), "it was not asked whether the order can be called off: %+v", told.Steps)
	}, checkouts)
	require.Equal(t, []string{"o1 charge 4900"}, w.booked())
	require.Equal(t, []string{"Ann: We have your order", "Ann: Your parcel is on its way"}, w.sent())
}

// TestCheckout_AnswersLost: the gateway does what it is asked, and its answers
// are lost. The card is charged once all the same, and when the program has
// given up, it gets back what it does not know of.
func TestCheckout_AnswersLost(t *testing.T) {
	t.Parallel()
	for lost, want := range map[int][]string{
		3:  {"o1 charge 4900"},
		10: {"o1 charge 4900", "o1 refund 4900"},
	} {
		t.Run(fmt.Sprintf("%d answers", lost), func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int64
			w := newWorld(t, func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if asked.Add(1) > int64(lost) {
						next.ServeHTTP(w, r)
						return
					}
					next.ServeHTTP(httptest.NewRecorder(), r)
					http.Error(w, "something went wrong", http.StatusBadGateway)
				})
			})
			s := tell(t, w).
				When("order", "o1", placed("golden")).
				Advance(time.Hour)
			if lost < 10 {
				s.Waiting("o1", "order.shipped")
			} else {
				s.Failed("o1", nil, "refund", "release")
			}
			require.Equal(t, want, w.booked())
		})
	}
}

// TestCheckout_CrashEverywhere kills the process around everything that it
// writes, in three stories. What the gateway booked and what was mailed comes
// out the same each time.
func TestCheckout_CrashEverywhere(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		story  func(s *sagatest.Spec)
		booked []string
		mails  int
	}{
		"completes": {func(s *sagatest.Spec) {
			s.When("order", "o1", placed("golden")).When("order", "o1", OrderShipped{"parcel-1"}).Completed("o1", Receipt{"charge-1", "parcel-1"})
		}, []string{"o1 charge 4900"}, 2},
		"never shipped": {func(s *sagatest.Spec) {
			s.When("order", "o1", placed("golden")).Advance(14*day).Failed("o1", ErrNeverShipped, "refund", "release")
		}, []string{"o1 charge 4900", "o1 refund 4900"}, 1},
		"cancelled": {func(s *sagatest.Spec) {
			s.When("order", "o1", placed("golden")).Cancel("o1", "changed my mind").Cancelled("o1", "refund", "release")
		}, []string{"o1 charge 4900", "o1 refund 4900"}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w *world
			sagatest.CrashEverywhere(t, func() sagatest.Process {
				w = newWorld(t)
				return checkout(w.shop)
			}, func(s *sagatest.Spec) {
				c.story(s.Given("stock", "lamp", Stocked{1}))
			}, func(t testing.TB) {
				require.Equal(t, c.booked, w.booked())
				require.Len(t, w.sent(), c.mails)
			})
		})
	}
}

// before is the checkout of the last release, which confirmed nothing.
func before(shop Shop) *saga.Definition[OrderPlaced, Receipt] {
	return saga.Define("checkout", func(s *saga.Run, order OrderPlaced) (Receipt, error) {
		id := s.ID()
		s.Publish("stage", "reserving")
		if err := saga.Execute(s, "reserve", stocks, Reserve{order.SKU, id}); err != nil {
			return Receipt{}, err
		}
		s.OnRollback("release", func(s *saga.Run) error {
			return saga.Execute(s, "release", stocks, Release{order.SKU, id})
		})
		s.Publish("stage", "charging")
		s.OnRollback("refund", func(s *saga.Run) error { return shop.refund(s) })
		charge, err := saga.Do(s, "charge", func(ctx saga.Step) (string, error) {
			return shop.Payments.Charge(ctx, id, order.Card, order.Cents, ctx.IdempotencyKey())
		})
		if err != nil {
			return Receipt{}, err
		}
		if err := saga.Execute(s, "pay", orders, Pay{id, charge}); err != nil {
			return Receipt{}, err
		}
		s.Publish("stage", "waiting for the parcel")
		parcel, err := shipment(s)
		if err != nil {
			return Receipt{}, err
		}
		s.Settled()
		s.Publish("stage", "shipped")
		return Receipt{charge, parcel}, shop.mail(s.Detached(), "thank", order, "Your parcel is on its way")
	}, saga.On(func(e OrderPlaced, r eventstore.Recorded) (string, OrderPlaced) { return r.Stream.ID, e }))
}

// TestCheckout_Deploy: an order that was under way before the confirmation was
// there goes on without; a new one gets it.
func TestCheckout_Deploy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := sagatest.For(t, before(w.shop)).
		Given("stock", "lamp", Stocked{2}).
		When("order", "old", placed("golden")).
		Waiting("old", "order.shipped").
		Deploy(checkout(w.shop)).
		When("order", "old", OrderShipped{"parcel-1"}).
		Completed("old", Receipt{"charge-1", "parcel-1"})
	require.Equal(t, []string{"Ann: Your parcel is on its way"}, w.sent())

	s.When("order", "new", placed("golden")).
		Waiting("new", "order.shipped")
	require.Equal(t, []string{"Ann: We have your order", "Ann: Your parcel is on its way"}, w.sent())
	uses, err := s.Engine().Versions(t.Context(), "checkout")
	require.NoError(t, err)
	require.Equal(t, []saga.VersionUse{{Name: "confirmation", Version: 1, Open: 1, Example: "new"}}, uses, "nobody needs the marker any more")
}

var update = flag.Bool("update", false, "write the histories in testdata anew")

// TestCheckout_Histories: orders that are under way, or were, fit the saga as it
// is today. The files are what "deed sagas export checkout ORDER" writes.
func TestCheckout_Histories(t *testing.T) {
	t.Parallel()
	if *update {
		s := sagatest.For(t, checkout(newWorld(t).shop)).Given("stock", "lamp", Stocked{3}).
			When("order", "declined", placed("empty")).
			When("order", "shipped", placed("golden")).
			When("order", "waits", placed("golden")).
			When("order", "shipped", OrderShipped{"parcel-1"})
		for _, order := range []string{"declined", "shipped", "waits"} {
			history, err := s.Engine().Export(t.Context(), "checkout", order)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join("testdata", order+".json"), history, 0o600))
		}
	}
	sagatest.Replay(t, checkout(Shop{}), "testdata")
}

// TestCheckout_Length keeps the saga short enough to be read at a glance.
func TestCheckout_Length(t *testing.T) {
	t.Parallel()
	files := token.NewFileSet()
	source, err := parser.ParseFile(files, "checkout.go", nil, 0)
	require.NoError(t, err)
	lines := 0
	for _, d := range source.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Name.Name == "checkout" && f.Recv != nil {
			lines = files.Position(f.End()).Line - files.Position(f.Pos()).Line + 1
		}
	}
	require.NotZero(t, lines, "the method Shop.checkout is not in checkout.go")
	require.LessOrEqual(t, lines, 40)
}

// run runs the program in a process of its own.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	binary, err := os.Executable()
	require.NoError(t, err)
	child := exec.CommandContext(t.Context(), binary, args...)
	child.Env = append(os.Environ(), "CHECKOUT_PROGRAM=1")
	var stderr bytes.Buffer
	child.Stderr = &stderr
	stdout, err := child.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.String())
	}
	return string(stdout), err
}

// told is how the four orders of the program end, and the lamps.
const told = `order-1: completed 
order-2: failed step "charge": charge of order "order-2": the card was declined
order-3: failed the order was never shipped
order-4: cancelled step "order.shipped": saga was cancelled: changed my mind
9 lamps are free
`

func requireTold(t *testing.T, dir, stdout string) {
	t.Helper()
	require.True(t, strings.HasSuffix(stdout, told), "%s", stdout)
	g, err := openGateway(filepath.Join(dir, "ledger.jsonl"), io.Discard)
	require.NoError(t, err)
	require.NoError(t, g.file.Close())
	booked := (&world{gateway: g}).booked()
	slices.Sort(booked)
	require.Equal(t, []string{
		"order-1 charge 4900",
		"order-2 refund 0",
		"order-3 charge 4900", "order-3 refund 4900",
		"order-4 charge 4900", "order-4 refund 4900",
	}, booked)
	mails, err := filepath.Glob(filepath.Join(dir, "mailbox", "*.eml"))
	require.NoError(t, err)
	require.Len(t, mails, 4)
}

func TestProgram(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for range 2 { // again changes nothing
		var out bytes.Buffer
		require.NoError(t, program(t.Context(), []string{"-dir", dir}, &out, &out))
		requireTold(t, dir, out.String())
	}
}

// TestProgram_Crash: killed at any point, and started again, it ends as if
// nothing had been.
func TestProgram_Crash(t *testing.T) {
	t.Parallel()
	for _, point := range points {
		for _, store := range []string{"sqlite", "nats"} {
			t.Run(point+" on "+store, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				args := []string{"-dir", dir, "-store", store + ":" + filepath.Join(dir, "log")}
				_, err := run(t, append(args, "-crash", point)...)
				var exit *exec.ExitError
				require.True(t, errors.As(err, &exit), "it should have died: %v", err)
				require.False(t, exit.Exited(), "it should have been killed: %v", err)

				stdout, err := run(t, args...)
				require.NoError(t, err)
				requireTold(t, dir, stdout)
			})
		}
	}
}

func TestProgram_BadFlags(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.ErrorContains(t, program(t.Context(), []string{"-crash", "never"}, &out, &out), `-crash "never": say one of before-charge, `)
	require.NoError(t, program(t.Context(), []string{"-help"}, &out, &out))
	require.Contains(t, out.String(), "-crash POINT")
}

// TestGateway_Refuses: what is no payment is not booked.
func TestGateway_Refuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	payments, ok := w.shop.Payments.(Payments)
	require.True(t, ok)
	_, err := payments.Charge(ctx, "o1", "golden", 100, "")
	require.ErrorContains(t, err, "400")
	_, err = payments.post(ctx, "gift", payment{Order: "o1"}, "k1")
	require.ErrorContains(t, err, "404")
	require.Empty(t, w.booked())

	require.NoError(t, payments.Refund(ctx, "o1", "k2"))
	_, err = payments.Charge(ctx, "o1", "golden", 100, "k3")
	require.ErrorIs(t, err, ErrDeclined, "a charge that comes after its refund")
	require.True(t, saga.IsTerminal(err))
}
