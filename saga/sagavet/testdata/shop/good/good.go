// Package good has sagas in which nothing is to be found.
package good

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/query"
	"github.com/deed-go/deed/saga"
	"github.com/google/uuid"
)

type Order struct {
	ID    string
	Lines map[string]int
	At    time.Time
}

type Shipped struct{}

var bus *command.Bus

var checkout = saga.Define("checkout", func(s *saga.Run, in Order) (string, error) {
	// The time, random values and the world, each in a step.
	id := saga.Local(s, "id", func() string { return uuid.NewString() })
	at := saga.Local(s, "time", time.Now)
	other := saga.Local(s, "other", uuid.NewString)
	lucky := saga.Local(s, "lucky", lottery(6))
	payload, err := saga.Do(s, "charge", func(ctx saga.Step) (string, error) {
		answer, err := http.Get("http://localhost/" + s.ID() + ctx.IdempotencyKey() + os.Getenv("SHOP"))
		if err != nil {
			return "", err
		}
		var group sync.WaitGroup
		results := make(chan string, 1)
		group.Go(func() { results <- answer.Status })
		group.Wait()
		select {
		case r := <-results:
			return r, command.Execute(ctx, bus, in)
		case <-time.After(time.Second):
			return "", context.Cause(ctx)
		}
	})
	if err != nil {
		return "", err
	}
	// Functions by name: given a step, or made into one.
	roll := func() int { return rand.IntN(6) }
	dice := saga.Local(s, "dice", roll)
	age := func() time.Duration { return time.Since(in.At) }
	aged := func() float64 { return age().Hours() }
	_ = saga.Local(s, "age", func() float64 { return aged() + age().Hours() })
	if _, err := saga.Do(s, "mail", mail); err != nil {
		return "", err
	}
	if _, err := saga.Do(s, "letter", letter("thanks")); err != nil {
		return "", err
	}
	if _, err := saga.Tx(s, "row", func(saga.Step, any) (time.Time, error) { return time.Now(), nil }); err != nil {
		return "", err
	}

	// The run's own time and waits.
	if s.Now().After(in.At) {
		if err := s.Sleep("a day", 24*time.Hour); err != nil {
			return "", err
		}
	}
	if _, err := saga.Await[Shipped](s, time.Hour); err != nil {
		return "", err
	}

	// Compensations and branches are given the run.
	s.OnRollback("undo", func(s *saga.Run) error { return saga.Execute(s, "release", in) })
	if err := saga.All(s, "both", func(s *saga.Run) error { return s.Sleep("a", time.Second) }, branch); err != nil {
		return "", err
	}

	if _, err := (saga.Signal[int]{}).Wait(s, time.Hour); err != nil {
		return "", err
	}

	// Maps in order, and maps where no order matters.
	for _, sku := range slices.Sorted(maps.Keys(in.Lines)) {
		if err := saga.Execute(s, "reserve "+sku, sku); err != nil {
			return "", err
		}
	}
	total := 0
	for _, n := range in.Lines {
		total += n
	}
	for sku := range in.Lines {
		fmt.Println(sku, s.ID(), s.Now())
	}

	// What has a seed, or a name, is the same each time.
	dealt := rand.New(rand.NewPCG(1, uint64(total))).IntN(52)
	name := uuid.NewSHA1(uuid.MustParse("1"), []byte(s.ID()))
	local := s
	if err := local.Until("then", at.Add(time.Duration(dealt+dice+lucky))); err != nil {
		return "", errors.Join(err, command.Rejectf("%s", name))
	}
	s.Settled()
	return id + other + payload, nil
}, saga.On(func(o Order, r saga.Recorded) (string, Order) {
	o.At = r.Time.Add(time.Hour)
	return o.ID, o
}))

func branch(s *saga.Run) error { return s.Sleep("b", time.Second) }

func mail(ctx saga.Step) (int, error) { return rand.Int(), nil }

// letter makes a step.
func letter(text string) func(saga.Step) (time.Time, error) {
	return func(ctx saga.Step) (time.Time, error) { return time.Now(), nil }
}

// lottery makes a step too.
func lottery(sides int) func() int { return func() int { return rand.IntN(sides) } }

var welcome = saga.React("welcome", func(ctx saga.Step, o Order) error {
	_, err := query.Get(ctx, o.ID)
	time.Sleep(time.Until(o.At))
	return err
})

// Place is no saga, and makes one.
func Place(ctx context.Context, host saga.Host, o Order) error { // want Place:`time.Now`
	o.At = time.Now()
	go func() { _ = saga.Start(ctx, host, checkout, o.ID, o) }()
	return saga.Start(ctx, host, checkout, o.ID, o)
}
