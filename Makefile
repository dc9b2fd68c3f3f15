.DEFAULT_GOAL := help

# Where tools of the project are built; nothing is installed elsewhere.
BIN := $(CURDIR)/bin
LINT_VERSION := v2.15.0
FUZZTIME ?= 10s

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: test
test: ## Run all tests, as users would: go test ./...
	go test ./...

.PHONY: race
race: ## Run all tests under the race detector
	go test -race -timeout 20m ./...

.PHONY: long
long: ## Run all tests, the long ones too: crashes, power losses, 30,000 fines
	DEED_TEST_LONG=1 go test -timeout 40m ./...

.PHONY: lint
lint: $(BIN)/golangci-lint-$(LINT_VERSION) ## Look for bugs and wrong formatting
	$(BIN)/golangci-lint-$(LINT_VERSION) run --allow-parallel-runners ./...

.PHONY: sagas
sagas: ## Look for sagas that would not do the same at a replay
	go build -buildvcs=false -o $(BIN)/deedvet ./cmd/deedvet
	$(BIN)/deedvet ./...

.PHONY: fmt
fmt: $(BIN)/golangci-lint-$(LINT_VERSION) ## Format all files
	$(BIN)/golangci-lint-$(LINT_VERSION) fmt ./...

.PHONY: layers
layers: ## Check that imports between packages point down only
	go test -count=1 ./internal/layers

.PHONY: bench
bench: ## Run every benchmark; BENCH=regexp picks some
	go test -run '^$$' -bench '$(or $(BENCH),.)' -benchmem ./...

.PHONY: cover
cover: ## Write cover.html: which lines the tests reach
	go test -coverpkg=./... -coverprofile=cover.out ./...
	go tool cover -html=cover.out -o cover.html
	go tool cover -func=cover.out | tail -n 1

.PHONY: fuzz
fuzz: ## Run every fuzz test for FUZZTIME (10s)
	@.ci/fuzz $(FUZZTIME)

.PHONY: examples
examples: ## Run every example once
	go run ./examples/quickstart
	go run ./examples/mail
	go run ./examples/fines

.PHONY: ci
ci: ## Everything that must pass before a change is merged
	.ci/run

# The version is part of the name, so that a new version is built anew.
$(BIN)/golangci-lint-$(LINT_VERSION):
	GOBIN=$(BIN) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION)
	mv $(BIN)/golangci-lint $@
