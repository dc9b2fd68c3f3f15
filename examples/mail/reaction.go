package main

import (
	"context"
	"fmt"
	"net/url"

	"github.com/wneessen/go-mail"

	"github.com/deed-go/deed/saga"
)

// welcome is the reaction: a function that is run for every order placed. If
// it fails it is tried again, later and later; if the process dies it is run
// after the next start; and what has been done is not done again. Its
// idempotency key is the same in every attempt.
func welcome(mailer Mailer) *saga.Reaction {
	return saga.React("welcome", func(ctx saga.Step, e OrderPlaced) error {
		return mailer.Welcome(ctx, e, ctx.IdempotencyKey())
	})
}

// Mailer sends mail through a server on this machine.
type Mailer struct {
	Port int
	// Before and After, if set, are called around the sending.
	Before, After func()
}

// Welcome sends a customer the welcome. The key becomes the Message-ID, by
// which mail servers and programs recognise a mail that was sent twice.
func (m Mailer) Welcome(ctx context.Context, order OrderPlaced, key string) error {
	message := mail.NewMsg()
	if err := message.FromFormat("The Shop", "orders@shop.example"); err != nil {
		return err
	}
	if err := message.AddToFormat(order.Name, order.Email); err != nil {
		return fmt.Errorf("address the customer: %w", err)
	}
	message.Subject("Welcome, " + order.Name)
	message.SetMessageIDWithValue(url.QueryEscape(key) + "@shop.example")
	message.SetDate()
	message.SetBodyString(mail.TypeTextPlain, "Thank you for your first order. It is on its way.")

	// The server is on this machine and has no certificate.
	client, err := mail.NewClient("127.0.0.1", mail.WithPort(m.Port), mail.WithTLSPolicy(mail.NoTLS), mail.WithHELO("shop.example"))
	if err != nil {
		return err
	}
	if m.Before != nil {
		m.Before()
	}
	if err := client.DialAndSendWithContext(ctx, message); err != nil {
		return fmt.Errorf("send the welcome to %q: %w", order.Email, err)
	}
	if m.After != nil {
		m.After()
	}
	return nil
}
