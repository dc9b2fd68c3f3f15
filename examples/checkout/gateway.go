package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"

	"github.com/deed-go/deed/saga"
)

// ErrDeclined is what a card comes to that has no money.
var ErrDeclined = errors.New("the card was declined")

// Payments is the client of a payment gateway.
type Payments struct {
	URL string
	// At, if set, is told where the client is: before and after a charge or refund.
	At func(point string)
}

type payment struct {
	Order string `json:"order"`
	Card  string `json:"card,omitempty"`
	Cents int64  `json:"cents,omitempty"`
}

// Charge charges the card for the order, once for the key however often it is
// called, and returns the name of the charge.
func (p Payments) Charge(ctx context.Context, order, card string, cents int64, key string) (string, error) {
	return p.post(ctx, "charge", payment{order, card, cents}, key)
}

// Refund gives back what was charged for the order, and makes the gateway
// refuse a charge for it that is still on its way.
func (p Payments) Refund(ctx context.Context, order, key string) error {
	_, err := p.post(ctx, "refund", payment{Order: order}, key)
	return err
}

func (p Payments) post(ctx context.Context, what string, body payment, key string) (string, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return "", err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL+"/"+what, bytes.NewReader(data))
	if err != nil {
		return "", err
	}
	request.Header.Set("Idempotency-Key", key)
	request.Close = true
	p.at("before-" + what)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	p.at("after-" + what)
	switch response.StatusCode {
	case http.StatusOK:
		return string(answer), nil
	case http.StatusPaymentRequired:
		return "", saga.Terminal(fmt.Errorf("%s of order %q: %w", what, body.Order, ErrDeclined)) // trying again would not help
	}
	return "", fmt.Errorf("%s of order %q: the gateway says %s: %s", what, body.Order, response.Status, answer)
}

func (p Payments) at(point string) {
	if p.At != nil {
		p.At(point)
	}
}

// entry is a line of the gateway's ledger.
type entry struct {
	Kind  string `json:"kind"` // charge or refund
	ID    string `json:"id"`
	Key   string `json:"key"`
	Order string `json:"order"`
	Cents int64  `json:"cents"`
}

// gateway takes payments, and knows a repetition by its key. What it has done
// is in its ledger before it answers.
type gateway struct {
	out io.Writer

	mu     sync.Mutex
	file   *os.File // nil: the ledger is in memory only
	ledger []entry
}

// openGateway reads the ledger, or begins one.
func openGateway(path string, out io.Writer) (*gateway, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	g := &gateway{file: file, out: out}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var e entry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return nil, errors.Join(fmt.Errorf("ledger %q, line %d: %w", path, len(g.ledger)+1, err), file.Close())
		}
		g.ledger = append(g.ledger, e)
	}
	if err := lines.Err(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return g, nil
}

// ServeHTTP implements http.Handler.
func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var p payment
	key := r.Header.Get("Idempotency-Key")
	if err := json.NewDecoder(r.Body).Decode(&p); err != nil || key == "" || p.Order == "" {
		http.Error(w, "a payment has an order, and a key by which a repetition is known", http.StatusBadRequest)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range g.ledger {
		if e.Key == key {
			fmt.Fprintf(g.out, "gateway: the %s of %s is here already\n", e.Kind, e.Order)
			fmt.Fprint(w, e.ID)
			return
		}
	}
	charged, refunded := g.of(p.Order)
	e := entry{Kind: r.URL.Path[1:], ID: fmt.Sprintf("%s-%d", r.URL.Path[1:], len(g.ledger)+1), Key: key, Order: p.Order, Cents: p.Cents}
	switch e.Kind {
	case "charge":
		if p.Card == "empty" || refunded {
			fmt.Fprintf(g.out, "gateway: %s is declined\n", p.Order)
			w.WriteHeader(http.StatusPaymentRequired)
			return
		}
	case "refund":
		e.Cents = charged
	default:
		http.NotFound(w, r)
		return
	}
	if err := g.write(e); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprintf(g.out, "gateway: %s of %d cents for %s\n", e.Kind, e.Cents, e.Order)
	fmt.Fprint(w, e.ID)
}

// of returns what an order was charged and not given back, and whether its
// charges were closed by a refund.
func (g *gateway) of(order string) (charged int64, refunded bool) {
	for _, e := range g.ledger {
		switch {
		case e.Order != order:
		case e.Kind == "charge":
			charged += e.Cents
		default:
			charged, refunded = charged-e.Cents, true
		}
	}
	return charged, refunded
}

func (g *gateway) write(e entry) error {
	if g.file != nil {
		line, err := json.Marshal(e)
		if err != nil {
			return err
		}
		_, err = g.file.Write(append(line, '\n'))
		if err := errors.Join(err, g.file.Sync()); err != nil {
			return err
		}
	}
	g.ledger = append(g.ledger, e)
	return nil
}

// serve serves on a free port of the loopback interface until stop is called,
// which closes the ledger too.
func (g *gateway) serve() (url string, stop func() error, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, errors.Join(err, g.file.Close())
	}
	server := &http.Server{Handler: g}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	return "http://" + listener.Addr().String(), func() error {
		err := server.Close()
		if ended := <-served; !errors.Is(ended, http.ErrServerClosed) {
			err = errors.Join(err, ended)
		}
		return errors.Join(err, g.file.Close())
	}, nil
}
